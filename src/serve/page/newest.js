/* The first screen, which shows the newest pictures; and right and wrong results, where the server knows what its images show. */

/** Number of pictures on the first screen. */
const NEWEST_COUNT = 48;
/** How often the score is requested again while the catalogue changes. */
const SCORE_REFRESH_MS = 10_000;

/* First screen */
async function showNewest({ silent = false } = {}) {
  if (!app.state.ready) return waitUntilReady(app.state);
  Object.assign(app, { refreshedAt: Date.now(), stale: false });
  const response = await request(`v1/images/newest?limit=${NEWEST_COUNT}`).catch((problem) => {
    app.stale = silent;
    if (!silent) showProblem(problem, runSearch);
    return null;
  });
  if (!response || hasQuery(app.query)) return; // or a search has been started in the meantime
  app.answer = null;
  const { images } = app.state;
  if (!response.images.length) return showEmpty('The catalogue is empty', 'No image has been ingested yet. Images appear here as they are stored.');
  [$('newest').hidden, $('empty').hidden, $('results').hidden] = [false, true, true];
  const shown = response.images.length;
  $('newest-status').textContent = `${formatCount(shown)} of ${formatCount(Math.max(images, shown))} images. Describe a picture, choose an example, or drop a picture anywhere on this page.`;
  renderColumn($('newest'), response.images, newestCard);
  renderRefreshButton();
}
const hasQuery = (query) => Boolean(query.text) || isPictureQuery(query);

function newestCard(image) {
  const title = el('span', { class: 'title', title: titleOf(image) }, titleOf(image));
  const label = `More like ${titleOf(image)}`;
  const properties = { type: 'button', class: 'card', 'data-test': 'newest-card', 'data-picture': image.picture, title: label, 'aria-label': label, onclick: () => searchSimilar(image) };
  return [el('button', properties, thumbnail(image.picture), title)];
}

/* Right and wrong results */
const markNode = (right) => {
  const [kind, sign, label] = right ? ['right', '✓', 'right'] : ['wrong', '✗', 'wrong'];
  return el('span', { class: `mark ${kind}`, 'data-test': 'mark', role: 'img', title: `${label}, by what the program drew`, 'aria-label': label }, sign);
};

/** How many of the hits are right; an empty text if the server does not know. */
function rightSummary({ right_images }, hits) {
  if (right_images === undefined) return '';
  if (!right_images) return 'No picture in the catalogue is right';
  const right = hits.filter((hit) => hit.right).length;
  return `${right} of ${formatCount(right_images)} right pictures among these ${hits.length}`;
}

async function loadScore() {
  const { known, score } = app.score ?? { known: true };
  const due = known && (score?.table_version !== app.state?.table_version || score?.configuration !== app.state?.configuration);
  if (!due || !app.state?.ready || document.hidden || Date.now() - loadScore.at < SCORE_REFRESH_MS) return;
  loadScore.at = Date.now();
  app.score = await request('v1/sample-score').catch(() => app.score);
  renderScore();
}
loadScore.at = 0;

function renderScore() {
  const score = app.score?.score;
  $('score').hidden = !score;
  if (!score) return;
  const { queries, plain, balanced, false_first_hits, recall, recall_depth, summary, normaliser, weight } = score;
  const percent = (share) => `${(share * 100).toFixed(1)} %`;
  const points = (share) => `${share > 0 ? '+' : ''}${(share * 100).toFixed(1)}`.replace('-', '−');
  const difference = ({ mean, low, high, verdict }) =>
    el('td', { class: verdict }, `${points(mean)} points`, el('span', { class: 'interval' }, ` (${points(low)} to ${points(high)})`));
  const row = (name, { false_first_hits: wrong, recall: found }) => tableRow(name, `${wrong} of ${queries} (${percent(wrong / queries)})`, percent(found));
  const heading = el('tr', {}, ...['', 'First result wrong', `Right pictures found in the first ${recall_depth}`].map((name) => el('th', { scope: 'col' }, name)));
  const last = el('tr', {}, el('th', { scope: 'row' }, 'Difference'), difference(false_first_hits), difference(recall));
  const rows = [heading, row('Plain CLIP', plain), row(`Balanced (${normaliserName(normaliser)}, weight ${weight.toFixed(2)})`, balanced), last];
  const explanation = `The program drew these pictures, so it knows the right answers. Both rankings answered ${queries} sample queries that at least one picture matches. Right pictures found: among the first ${recall_depth} results, of all that there are, or of ${recall_depth} if there are more. In brackets: 95 % intervals of the difference per query.`;
  const name = el('h2', {}, hintButton(`${queries} sample queries`, explanation, 'score-name'));
  const next = [name, el('table', { class: 'number' }, ...rows), el('p', { class: 'small', 'data-test': 'score-summary' }, summary)];
  if (next.some((node, index) => !$('score').children[index]?.isEqualNode(node))) $('score').replaceChildren(...next);
}
