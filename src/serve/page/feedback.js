/* Feedback: users' verdicts on whether an image matches a text. Evaluations read it. */

const verdictFor = (text, id) => app.verdicts.get(JSON.stringify([text, id]));

/** Sends the verdict that an image is `right` or `wrong` for the text of the query that found it. */
async function sendFeedback({ text, overrides }, hit, verdict, note = '') {
  // With overrides no configuration has answered.
  const configuration = overrides ? undefined : app.answer?.configuration;
  try {
    await request('v1/feedback', { text, image_id: hit.image_id, verdict, ...(note && { note }), ...(configuration && { configuration }) });
    app.verdicts.set(JSON.stringify([text, hit.image_id]), verdict);
    toast(`Noted: ${titleOf(hit)} is ${verdict} for “${text}”`);
    renderVerdicts();
  } catch (problem) {
    toast(`Not noted: ${problem.detail}`);
  }
}

/** The flag on a hit, for a wrong image; `null` unless the query is a text and the key may send feedback. */
function wrongImageButton(hit) {
  const { query } = app.answer;
  if (!query.text || !hasScope('feedback')) return null;
  const flag = iconButton('wrong', `Wrong image: ${titleOf(hit)}`, 'mark-wrong', () => sendFeedback(app.answer.query, hit, 'wrong'));
  flag.setAttribute('aria-pressed', verdictFor(query.text, hit.image_id) === 'wrong');
  return flag;
}

/** The form next to an explanation, with both verdicts and a note; `null` as for the flag. */
function feedbackForm(query, hit) {
  if (!query.text || !hasScope('feedback')) return null;
  const note = el('input', { type: 'text', maxlength: 1000, placeholder: 'A note, if you like', 'aria-label': 'A note', 'data-test': 'note' });
  const verdictButton = (verdict, label) =>
    buildNode(button(label, `verdict-${verdict}`, () => sendFeedback(query, hit, verdict, note.value.trim())), { 'data-verdict': verdict, 'aria-pressed': String(verdictFor(query.text, hit.image_id) === verdict) }, []);
  return el('div', { class: 'judgement', role: 'group', 'aria-label': 'Does it match?', 'data-image-id': hit.image_id, 'data-text': query.text },
    el('p', { class: 'small muted' }, `Does it match “${query.text}”?`), note, verdictButton('right', 'Right'), verdictButton('wrong', 'Wrong image'));
}

function renderVerdicts() {
  for (const flag of document.querySelectorAll('[data-test=mark-wrong]')) {
    flag.setAttribute('aria-pressed', verdictFor(app.answer?.query.text, flag.closest('li').dataset.imageId) === 'wrong');
  }
  for (const node of document.querySelectorAll('.judgement button')) {
    const { text, imageId } = node.closest('.judgement').dataset;
    node.setAttribute('aria-pressed', verdictFor(text, imageId) === node.dataset.verdict);
  }
}
