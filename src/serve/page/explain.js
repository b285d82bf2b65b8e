/* The explanation of an image's rank. */

const HISTOGRAM_BINS = 28;
/** Pixels of the preview next to the explanation: above its width on screens of every size. */
const LARGE_PREVIEW_SIDE = 512;

async function openExplanation(id) {
  const { image_id: queryImage, ...rest } = requestBody(app.query);
  const hit = findHit(id) ?? { image_id: id, picture: pictureAddress(id) };
  const body = { ...rest, ...(queryImage && { query_image_id: queryImage }), image_id: id };
  const query = snapshotQuery(app.query);
  app.explanation = body;
  app.query.explainedImage = $('explain').dataset.imageId = id;
  writeAddress(false);
  $('copy').disabled = true;
  $('copy').textContent = 'Copy as JSON';
  $('explain-name').textContent = titleOf(hit);
  $('explain-body').replaceChildren(el('div', { class: 'side' }, pictureBox(hit.picture, LARGE_PREVIEW_SIDE)), el('p', { class: 'muted' }, 'Loading…'));
  if (!$('explain').open) $('explain').showModal();
  try {
    const explanation = await request('v1/explain', body);
    if (app.explanation !== body) return;
    app.explanation = { query: body, ...explanation };
    $('copy').disabled = false;
    $('explain-name').textContent = titleOf(explanation.hit);
    renderExplanation(query, explanation);
  } catch (problem) {
    if (app.explanation !== body) return;
    const retry = button('Try again', 'explain-retry', () => openExplanation(id));
    const message = el('p', { role: 'alert', 'data-test': 'explain-error' }, `${ERROR_TITLES[problem.status] ?? problem.title}: ${problem.detail} `, retry);
    $('explain-body').lastChild.replaceWith(message);
  }
}
function onExplanationClosed() {
  // If the back button closed it, the query may have another image to explain.
  if (app.query.explainedImage === $('explain').dataset.imageId) app.query.explainedImage = '';
  writeAddress(false);
  renderRefreshButton();
}

function renderExplanation(query, explanation) {
  const { hit, statistics, prompts, explanation: sentence } = explanation;
  const main = el('div', { class: 'main' }, el('p', { class: 'sentence' }, sentence), rankTable(explanation), formulaNode(hit));
  const moreLikeThis = button('More like this', 'explain-more-like', () => searchSimilar(hit));
  const acts = el('div', { class: 'acts' }, moreLikeThis, originalLink(hit));
  const side = el('div', { class: 'side' }, pictureBox(hit.picture, LARGE_PREVIEW_SIDE), acts, feedbackForm(query, hit), factsTable(explanation));
  $('explain-body').replaceChildren(side, main);
  if (!statistics || !prompts.length) return;
  const scale = scoreScale([hit.raw_score, ...prompts.map(({ score }) => score)]);
  const chart = el('figure', {}, el('h3', {}, `Scores of this image with ${prompts.length} auxiliary prompts`));
  main.append(chart, strongestPrompts(query.text || 'similar to the picture', hit.raw_score, prompts, scale));
  chart.append(histogram(hit.raw_score, statistics, prompts, scale, chart.clientWidth));
}

/** The original is loaded only on request: it may be large, and of a format that the browser cannot show. */
const originalLink = ({ picture }) =>
  (picture ? el('a', { class: 'quiet', href: picture, target: '_blank', rel: 'noopener', 'data-test': 'original' }, 'Original') : null);

const tableRow = (name, ...cells) => el('tr', {}, el('th', { scope: 'row' }, name), ...cells.map((cell) => el('td', {}, cell)));
function rankTable({ hit }) {
  const balanced = el('span', {}, `${hit.rank} `, badgeNode(rankMovement(hit)));
  const header = el('tr', {}, ...['', 'Plain CLIP', 'Balanced'].map((name) => el('th', { scope: 'col' }, name)));
  const scores = tableRow('Score', formatScore(hit.raw_score), formatScore(hit.score));
  return el('table', {}, header, scores, tableRow('Rank', String(hit.raw_rank), balanced));
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
    ...hit.attributes, 'image id': hit.image_id, uri: hit.uri ?? 'none: it came without one',
    size: hit.width ? `${hit.width} × ${hit.height}` : 'unknown: it was embedded elsewhere', sequence: hit.sequence, 'embedded at': new Date(hit.embedded_at).toLocaleString('en-GB'),
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
  const barHeight = (count) => count / Math.max(...counts) * (bottom - top);
  const box = (name, left, right, height) => svg('rect', { class: name, x: left, y: bottom - height, width: right - left, height });
  const marker = (name, score, y, label, left = scale.position(score) > 0.5) => {
    const [anchor, gap] = left ? ['end', -6] : ['start', 6];
    const line = svg('line', { x1: x(score), x2: x(score), y1: y - 10, y2: bottom });
    return svg('g', { class: name }, line, svg('text', { x: x(score) + gap, y, 'text-anchor': anchor }, label));
  };
  const labels = [`mean ${formatScore(mean)} ± ${formatScore(std)}`, `this query ${formatScore(raw)}`];
  return svg('svg', { viewBox: `0 0 ${width} 150`, role: 'img', 'aria-label': `Histogram: ${labels.join(', ')}`, 'data-test': 'histogram' },
    box('band', x(mean - std), x(mean + std), bottom - top + 8),
    ...counts.map((count, index) => box('bin', index * width / HISTOGRAM_BINS + 1, (index + 1) * width / HISTOGRAM_BINS - 1, barHeight(count))),
    svg('line', { class: 'axis', x1: 0, x2: width, y1: bottom, y2: bottom }),
    marker('mean', mean, 27, labels[0], raw > mean && x(mean) > 150), marker('query', raw, 12, labels[1]),
    svg('text', { y: 145 }, formatScore(scale.low)), svg('text', { x: width, y: 145, 'text-anchor': 'end' }, formatScore(scale.high)));
}

function strongestPrompts(text, raw, prompts, scale) {
  const rows = [...prompts, { text: `this query: ${text}`, score: raw, query: true }].sort((a, b) => b.score - a.score);
  const name = 'The prompts with the highest scores, and this query';
  const list = el('ol', { class: 'bars', tabindex: 0, 'aria-label': name }, ...rows.map((row) => promptBar(row, scale)));
  return el('section', { 'data-test': 'prompts' }, el('h3', {}, name), list);
}
function promptBar({ text, score, query = false }, scale) {
  const fill = el('span', { class: 'fill' });
  fill.style.width = `${scale.position(score) * 100}%`;
  const label = el('span', { class: 'text', title: text }, text);
  return el('li', { class: query ? 'query' : 'prompt' }, label, el('span', { class: 'track' }, fill), el('span', { class: 'number' }, formatScore(score)));
}

function copyExplanation() {
  $('copy').textContent = copyText(JSON.stringify(app.explanation, null, 2)) ? 'Copied' : 'Cannot copy here';
}
