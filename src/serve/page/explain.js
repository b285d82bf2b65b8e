/* Why an image ranks where it does. */

const HISTOGRAM_BINS = 28;

async function openExplanation(id) {
  const { image_id: like, ...rest } = requestBody(app.query);
  const known = findHit(id) ?? { image_id: id, picture: `/v1/images/${encodeURIComponent(id)}/picture` };
  const body = { ...rest, ...(like && { query_image_id: like }), image_id: id };
  const from = snapshotQuery(app.query);
  app.explained = body;
  app.query.explained = $('explain').dataset.imageId = id;
  writeAddress(false);
  $('copy').disabled = true;
  $('copy').textContent = 'Copy as JSON';
  $('explain-name').textContent = titleOf(known);
  $('explain-body').replaceChildren(el('div', { class: 'side' }, thumbnail(known.picture)), el('p', { class: 'muted' }, 'Loading…'));
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
    const again = button('Try again', 'explain-again', () => openExplanation(id));
    const words = el('p', { role: 'alert', 'data-test': 'explain-error' }, `${ERROR_TITLES[problem.status] ?? problem.title}: ${problem.detail} `, again);
    $('explain-body').lastChild.replaceWith(words);
  }
}
function onExplanationClosed() {
  // Going back may have closed it, to where another image is explained.
  if (app.query.explained === $('explain').dataset.imageId) app.query.explained = '';
  writeAddress(false);
  renderRefreshButton();
}

function renderExplanation(from, explanation) {
  const { hit, statistics, prompts, explanation: sentence } = explanation;
  const main = el('div', { class: 'main' }, el('p', { class: 'sentence' }, sentence), rankTable(explanation), formulaNode(hit));
  const like = button('More like this', 'explain-more-like', () => searchSimilar(hit));
  const side = el('div', { class: 'side' }, thumbnail(hit.picture), el('div', { class: 'acts' }, like), feedbackForm(from, hit), factsTable(explanation));
  $('explain-body').replaceChildren(side, main);
  if (!statistics || !prompts.length) return;
  const scale = scoreScale([hit.raw_score, ...prompts.map(({ score }) => score)]);
  const chart = el('figure', {}, el('h3', {}, `What this image scores on ${prompts.length} auxiliary prompts`));
  main.append(chart, strongestPrompts(from.text || 'like the picture', hit.raw_score, prompts, scale));
  chart.append(histogram(hit.raw_score, statistics, prompts, scale, chart.clientWidth));
}

const tableRow = (name, ...cells) => el('tr', {}, el('th', { scope: 'row' }, name), ...cells.map((cell) => el('td', {}, cell)));
function rankTable({ hit }) {
  const balanced = el('span', {}, `${hit.rank} `, badgeNode(rankMovement(hit)));
  const heads = el('tr', {}, ...['', 'Plain CLIP', 'Balanced'].map((name) => el('th', { scope: 'col' }, name)));
  const scores = tableRow('Score', formatScore(hit.raw_score), formatScore(hit.score));
  return el('table', {}, heads, scores, tableRow('Place', String(hit.raw_rank), balanced));
}
function formulaNode({ raw_score, score, alpha, beta }) {
  const shift = `${beta < 0 ? '−' : '+'} ${formatScore(Math.abs(beta))}`;
  return el('div', { class: 'formula', 'data-test': 'formula' },
    el('code', {}, 'score = α · raw + β'),
    el('code', {}, `${formatScore(score)} = ${formatScore(alpha)} · ${formatScore(raw_score)} ${shift}`),
    el('p', { class: 'small muted' }, 'α and β come from this image’s own prompt scores and are the same for every query.'));
}
function factsTable({ hit, prompt_set, normaliser, weight }) {
  const facts = {
    ...hit.attributes, 'image id': hit.image_id, uri: hit.uri ?? 'none: the bytes came in the event',
    size: `${hit.width} × ${hit.height}`, sequence: hit.sequence, 'embedded at': new Date(hit.embedded_at).toLocaleString('en-GB'),
    'prompt set': prompt_set, normaliser: `${normaliser}, weight ${weight.toFixed(2)}`,
  };
  return el('table', { class: 'facts' }, ...Object.entries(facts).map(([name, value]) => tableRow(name, value)));
}

/** Maps scores to 0..1, with some padding at either end. */
function scoreScale(scores) {
  const [min, max] = [Math.min(...scores), Math.max(...scores)];
  const padding = (max - min) * 0.06 || 0.01;
  return { low: min - padding, high: max + padding, position: (score) => clamp((score - min + padding) / (max - min + 2 * padding), 0, 1) };
}

function histogram(raw, { mean, std }, prompts, scale, width) {
  const [top, bottom] = [40, 130];
  const x = (score) => scale.position(score) * width;
  const counts = new Array(HISTOGRAM_BINS).fill(0);
  for (const { score } of prompts) counts[Math.min(HISTOGRAM_BINS - 1, Math.floor(scale.position(score) * HISTOGRAM_BINS))] += 1;
  const tall = (size) => size / Math.max(...counts) * (bottom - top);
  const box = (name, left, right, height) => svg('rect', { class: name, x: left, y: bottom - height, width: right - left, height });
  const marker = (name, score, y, words, left = scale.position(score) > 0.5) => {
    const [anchor, gap] = left ? ['end', -6] : ['start', 6];
    const line = svg('line', { x1: x(score), x2: x(score), y1: y - 10, y2: bottom });
    return svg('g', { class: name }, line, svg('text', { x: x(score) + gap, y, 'text-anchor': anchor }, words));
  };
  const words = [`mean ${formatScore(mean)} ± ${formatScore(std)}`, `this query ${formatScore(raw)}`];
  return svg('svg', { viewBox: `0 0 ${width} 150`, role: 'img', 'aria-label': `Histogram: ${words.join(', ')}`, 'data-test': 'histogram' },
    box('band', x(mean - std), x(mean + std), bottom - top + 8),
    ...counts.map((size, index) => box('bin', index * width / HISTOGRAM_BINS + 1, (index + 1) * width / HISTOGRAM_BINS - 1, tall(size))),
    svg('line', { class: 'axis', x1: 0, x2: width, y1: bottom, y2: bottom }),
    marker('mean', mean, 27, words[0], raw > mean && x(mean) > 150), marker('query', raw, 12, words[1]),
    svg('text', { y: 145 }, formatScore(scale.low)), svg('text', { x: width, y: 145, 'text-anchor': 'end' }, formatScore(scale.high)));
}

function strongestPrompts(text, raw, prompts, scale) {
  const rows = [...prompts, { text: `this query: ${text}`, score: raw, query: true }].sort((a, b) => b.score - a.score);
  const name = 'Its strongest prompts, with this query among them';
  const list = el('ol', { class: 'bars', tabindex: 0, 'aria-label': name }, ...rows.map((row) => promptBar(row, scale)));
  return el('section', { 'data-test': 'prompts' }, el('h3', {}, name), list);
}
function promptBar({ text, score, query = false }, scale) {
  const length = el('span', { class: 'fill' });
  length.style.width = `${scale.position(score) * 100}%`;
  const words = el('span', { class: 'text', title: text }, text);
  return el('li', { class: query ? 'query' : 'prompt' }, words, el('span', { class: 'track' }, length), el('span', { class: 'number' }, formatScore(score)));
}

function copyExplanation() {
  $('copy').textContent = copyText(JSON.stringify(app.explained, null, 2)) ? 'Copied' : 'Cannot copy here';
}
