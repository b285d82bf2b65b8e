/* What users say of results: whether an image matches a text. Evaluations read it. */

const verdictFor = (text, id) => app.marks.get(JSON.stringify([text, id]));

/** Says that an image is `right` or `wrong` for the text that was asked when it was found. */
async function sendFeedback({ text, overrides }, hit, verdict, note = '') {
  // Settings of one's own are no configuration.
  const configuration = overrides ? undefined : app.answer?.configuration;
  try {
    await request('/v1/feedback', { text, image_id: hit.image_id, verdict, ...(note && { note }), ...(configuration && { configuration }) });
    app.marks.set(JSON.stringify([text, hit.image_id]), verdict);
    toast(`Noted: ${titleOf(hit)} is ${verdict} for “${text}”`);
    renderVerdicts();
  } catch (problem) {
    toast(`Not noted: ${problem.detail}`);
  }
}

/** A flag on a hit of the answer that is shown; only what a text finds can be judged. */
function wrongImageButton(hit) {
  const { asked } = app.answer;
  if (!asked.text || !hasScope('feedback')) return null;
  const mark = iconButton('wrong', `Wrong image: ${titleOf(hit)}`, 'mark-wrong', () => sendFeedback(app.answer.asked, hit, 'wrong'));
  mark.setAttribute('aria-pressed', verdictFor(asked.text, hit.image_id) === 'wrong');
  return mark;
}

/** The same beside an explanation of what `asked` found, with a note. */
function feedbackForm(asked, hit) {
  if (!asked.text || !hasScope('feedback')) return null;
  const note = el('input', { type: 'text', maxlength: 1000, placeholder: 'A note, if you like', 'aria-label': 'A note', 'data-test': 'note' });
  const say = (verdict, words) =>
    buildNode(button(words, `say-${verdict}`, () => sendFeedback(asked, hit, verdict, note.value.trim())), { 'data-verdict': verdict, 'aria-pressed': String(verdictFor(asked.text, hit.image_id) === verdict) }, []);
  return el('div', { class: 'judgement', role: 'group', 'aria-label': 'Does it match?', 'data-image-id': hit.image_id, 'data-text': asked.text },
    el('p', { class: 'small muted' }, `Does it match “${asked.text}”?`), note, say('right', 'Right'), say('wrong', 'Wrong image'));
}

function renderVerdicts() {
  for (const mark of document.querySelectorAll('[data-test=mark-wrong]')) {
    mark.setAttribute('aria-pressed', verdictFor(app.answer?.asked.text, mark.closest('li').dataset.imageId) === 'wrong');
  }
  for (const say of document.querySelectorAll('.judgement button')) {
    const { text, imageId } = say.closest('.judgement').dataset;
    say.setAttribute('aria-pressed', verdictFor(text, imageId) === say.dataset.verdict);
  }
}
