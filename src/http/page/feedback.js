/* What users say of results: whether an image matches a text. Evaluations read it. */

const markOf = ({ image_id }) => app.marks.get(JSON.stringify([app.query.text, image_id]));

/** Says that an image is `right` or `wrong` for the text that is asked. */
async function judge(hit, verdict, note = '') {
  const { text } = app.query;
  // Settings of one's own are no configuration.
  const configuration = isChosen(app.query) ? undefined : app.answer?.configuration;
  try {
    await request('/v1/feedback', { text, image_id: hit.image_id, verdict, ...(note && { note }), ...(configuration && { configuration }) });
    app.marks.set(JSON.stringify([text, hit.image_id]), verdict);
    toast(`Noted: ${titleOf(hit)} is ${verdict} for “${text}”`);
    renderMarks();
  } catch (problem) {
    toast(`Not noted: ${problem.detail}`);
  }
}

/** A flag on a hit; only what a text finds can be judged. */
function wrongMark(hit) {
  if (!app.query.text || !may('feedback')) return null;
  const mark = iconButton('wrong', `Wrong image: ${titleOf(hit)}`, 'mark-wrong', () => judge(hit, 'wrong'));
  mark.setAttribute('aria-pressed', markOf(hit) === 'wrong');
  return mark;
}

/** The same beside an explanation, with a note. */
function judgement(hit) {
  if (!app.query.text || !may('feedback')) return null;
  const note = el('input', { type: 'text', maxlength: 1000, placeholder: 'A note, if you like', 'aria-label': 'A note', 'data-test': 'note' });
  const say = (verdict, words) =>
    fill(button(words, `say-${verdict}`, () => judge(hit, verdict, note.value.trim())), { 'data-verdict': verdict, 'aria-pressed': String(markOf(hit) === verdict) }, []);
  return el('div', { class: 'judgement', role: 'group', 'aria-label': 'Does it match?', 'data-image-id': hit.image_id },
    el('p', { class: 'small muted' }, `Does it match “${app.query.text}”?`), note, say('right', 'Right'), say('wrong', 'Wrong image'));
}

function renderMarks() {
  for (const mark of document.querySelectorAll('[data-test=mark-wrong]')) {
    mark.setAttribute('aria-pressed', markOf({ image_id: mark.closest('li').dataset.imageId }) === 'wrong');
  }
  for (const say of document.querySelectorAll('.judgement button')) {
    say.setAttribute('aria-pressed', markOf({ image_id: say.closest('.judgement').dataset.imageId }) === say.dataset.verdict);
  }
}
