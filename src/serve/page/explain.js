/* Why an image ranks where it does. */

const BINS = 28;

async function explain(id) {
  const { image_id: like, ...rest } = question(app.query);
  const known = found(id) ?? { image_id: id, picture: `/v1/images/${encodeURIComponent(id)}/picture` };
  const body = { ...rest, ...(like && { query_image_id: like }), image_id: id };
  const from = asked(app.query);
  app.explained = body;
  app.query.explained = $('explain').dataset.imageId = id;
  writeAddress(false);
  $('copy').disabled = true;
  $('copy').textContent = 'Copy as JSON';
  $('explain-name').textContent = titleOf(known);
  $('explain-body').replaceChildren(el('div', { class: 'side' }, thumb(known.picture)), el('p', { class: 'muted' }, 'Loading…'));
  if (!$('explain').open) $('explain').showModal();
  try {
    const answer = await request('/v1/explain', body);
    if (app.explained !== body) return;
    app.explained = { query: body, ...answer };
    $('copy').disabled = false;
    $('explain-name').textContent = titleOf(answer.hit);
    renderExplanation(from, answer);
  } catch (problem) {
    if (app.explained !== body) return;
    const again = button('Try again', 'explain-again', () => explain(id));
    const words = el('p', { role: 'alert', 'data-test': 'explain-error' }, `${TITLES[problem.status] ?? problem.title}: ${problem.detail} `, again);
    $('explain-body').lastChild.replaceWith(words);
  }
}
function explainClosed() {
  // Going back may have closed it, to where another image is explained.
  if (app.query.explained === $('explain').dataset.imageId) app.query.explained = '';
  writeAddress(false);
  renderStale();
}

function renderExplanation(from, explanation) {
  const { hit, statistics, prompts, sentence } = explanation;
  const main = el('div', { class: 'main' }, el('p', { class: 'sentence' }, sentence), places(explanation), formula(hit));
  const like = button('More like this', 'explain-more-like', () => moreLike(hit));
  const side = el('div', { class: 'side' }, thumb(hit.picture), el('div', { class: 'acts' }, like), judgement(from, hit), facts(explanation));
  $('explain-body').replaceChildren(side, main);
  if (!statistics || !prompts.length) return;
  const scale = scaleOf([hit.raw_score, ...prompts.map(({ score }) => score)]);
  const chart = el('figure', {}, el('h3', {}, `What this image scores on ${prompts.length} auxiliary prompts`));
  main.append(chart, strongest(from.text || 'like the picture', hit.raw_score, prompts, scale));
  chart.append(histogram(hit.raw_score, statistics, prompts, scale, chart.clientWidth));
}

const row = (name, ...cells) => el('tr', {}, el('th', { scope: 'row' }, name), ...cells.map((cell) => el('td', {}, cell)));
function places({ hit }) {
  const balanced = el('span', {}, `${hit.rank} `, badgeNode(movement(hit)));
  const heads = el('tr', {}, ...['', 'Plain CLIP', 'Balanced'].map((name) => el('th', { scope: 'col' }, name)));
  const scores = row('Score', number(hit.raw_score), number(hit.score));
  return el('table', {}, heads, scores, row('Place', String(hit.raw_rank), balanced));
}
function formula({ raw_score, score, alpha, beta }) {
  const shift = `${beta < 0 ? '−' : '+'} ${number(Math.abs(beta))}`;
  return el('div', { class: 'formula', 'data-test': 'formula' },
    el('code', {}, 'score = α · raw + β'),
    el('code', {}, `${number(score)} = ${number(alpha)} · ${number(raw_score)} ${shift}`),
    el('p', { class: 'small muted' }, 'α and β come from this image’s own prompt scores and are the same for every query.'));
}
function facts({ hit, prompt_set, normaliser, weight }) {
  const facts = {
    ...hit.attributes, 'image id': hit.image_id, uri: hit.uri ?? 'none: the bytes came in the event',
    size: `${hit.width} × ${hit.height}`, sequence: hit.sequence, 'embedded at': new Date(hit.embedded_at).toLocaleString('en-GB'),
    'prompt set': prompt_set, normaliser: `${normaliser}, weight ${weight.toFixed(2)}`,
  };
  return el('table', { class: 'facts' }, ...Object.entries(facts).map(([name, value]) => row(name, value)));
}

/** Maps scores to 0..1, with some room at either end. */
function scaleOf(scores) {
  const [least, most] = [Math.min(...scores), Math.max(...scores)];
  const room = (most - least) * 0.06 || 0.01;
  return { low: least - room, high: most + room, of: (score) => clamp((score - least + room) / (most - least + 2 * room), 0, 1) };
}

function histogram(raw, { mean, std }, prompts, scale, width) {
  const [top, bottom] = [40, 130];
  const x = (score) => scale.of(score) * width;
  const counts = new Array(BINS).fill(0);
  for (const { score } of prompts) counts[Math.min(BINS - 1, Math.floor(scale.of(score) * BINS))] += 1;
  const tall = (size) => size / Math.max(...counts) * (bottom - top);
  const box = (name, left, right, height) => svg('rect', { class: name, x: left, y: bottom - height, width: right - left, height });
  const marker = (name, score, y, words, left = scale.of(score) > 0.5) => {
    const [anchor, gap] = left ? ['end', -6] : ['start', 6];
    const line = svg('line', { x1: x(score), x2: x(score), y1: y - 10, y2: bottom });
    return svg('g', { class: name }, line, svg('text', { x: x(score) + gap, y, 'text-anchor': anchor }, words));
  };
  const words = [`mean ${number(mean)} ± ${number(std)}`, `this query ${number(raw)}`];
  return svg('svg', { viewBox: `0 0 ${width} 150`, role: 'img', 'aria-label': `Histogram: ${words.join(', ')}`, 'data-test': 'histogram' },
    box('band', x(mean - std), x(mean + std), bottom - top + 8),
    ...counts.map((size, index) => box('bin', index * width / BINS + 1, (index + 1) * width / BINS - 1, tall(size))),
    svg('line', { class: 'axis', x1: 0, x2: width, y1: bottom, y2: bottom }),
    marker('mean', mean, 27, words[0], raw > mean && x(mean) > 150), marker('query', raw, 12, words[1]),
    svg('text', { y: 145 }, number(scale.low)), svg('text', { x: width, y: 145, 'text-anchor': 'end' }, number(scale.high)));
}

function strongest(text, raw, prompts, scale) {
  const rows = [...prompts, { text: `this query: ${text}`, score: raw, query: true }].sort((a, b) => b.score - a.score);
  const name = 'Its strongest prompts, with this query among them';
  const list = el('ol', { class: 'bars', tabindex: 0, 'aria-label': name }, ...rows.map((row) => bar(row, scale)));
  return el('section', { 'data-test': 'prompts' }, el('h3', {}, name), list);
}
function bar({ text, score, query = false }, scale) {
  const length = el('span', { class: 'fill' });
  length.style.width = `${scale.of(score) * 100}%`;
  const words = el('span', { class: 'text', title: text }, text);
  return el('li', { class: query ? 'query' : 'prompt' }, words, el('span', { class: 'track' }, length), el('span', { class: 'number' }, number(score)));
}

function copyExplanation() {
  $('copy').textContent = copy(JSON.stringify(app.explained, null, 2)) ? 'Copied' : 'Cannot copy here';
}
