/* Searches, and the texts about their results. */

const REFRESH_MS = 3000;
/** Maximum number of results that one request returns, and so a link; "More" adds further ones page by page. */
const MAX_RESULTS = 240;
/** Number of results that "More" adds if the search must be repeated. */
const PAGE_SIZE = 24;
const ERROR_TITLES = { 404: 'Not found', 422: 'Invalid search', 429: 'Busy' }; // by status, in place of the server's titles

/* State of the server */
async function loadState() {
  app.state = await request('v1/state').catch((problem) => app.state ?? showProblem(problem, startPage)) ?? null;
  if (!app.state) return;
  renderState();
  renderChoices();
  loadScore();
}

function renderState() {
  const { model, images, table_version, updated_at, generation, version } = app.state;
  if (updated_at && updated_at > app.changedAt) app.changedAt = updated_at;
  if (isOutdated(app.answer)) {
    app.stale = true;
    renderRefreshButton();
  }
  const name = el('b', { title: `${model.architecture}, ${model.dimension} dimensions, ${model.fingerprint}` }, model.name);
  const table = el('span', { title: `generation ${generation}, bsap ${version}` }, `version ${table_version}`);
  const age = app.changedAt ? [' · as of ', timeNode(app.changedAt)] : [];
  $('state').replaceChildren('model ', name, ' · ', el('b', {}, formatCount(images)), ' images · ', table, ...age);
  $('notice').hidden = !model.notice;
  $('notice').firstElementChild.textContent = model.notice ?? '';
  renderCandidate();
}

/** Whether the server has another version of the table, or another configuration: the page may have missed events. */
const isOutdated = (answer) => answer && (answer.query.revision !== app.state.revision
  || (answer.generation === app.state.generation && answer.table_version < app.state.table_version));

/** Shows how many queries the candidate and the live configuration have answered, and how shadow answers differ. */
function renderCandidate() {
  const { candidate, configuration, traffic } = app.state;
  $('candidate-traffic').hidden = !candidate;
  if (!candidate) return;
  const percent = (share) => `${Math.round(share * 1000) / 10} %`;
  const { live, candidate: byCandidate, shadow_queries, mean_overlap, top_hit_changed } = traffic;
  const shadow = shadow_queries
    ? ` Shadow queries: ${formatCount(shadow_queries)}, with ${percent(mean_overlap)} of the results in common and another best result in ${formatCount(top_hit_changed)}.`
    : candidate.shadow_share ? ` Shadow queries (${percent(candidate.shadow_share)}): none yet.` : '';
  $('candidate-traffic').replaceChildren(
    'Queries answered: ', el('b', {}, candidate.name), ` ${formatCount(byCandidate)} `,
    candidate.traffic_share ? `(${percent(candidate.traffic_share)} of the traffic), ` : '(only on request), ',
    el('b', {}, configuration), ` ${formatCount(live)}.`, shadow);
}

/** Searches. `silent`: an automatic refresh, which announces nothing and does not show problems. */
async function runSearch({ silent = false } = {}) {
  app.searchAbort?.abort();
  if (!silent) clearProblem();
  const { query } = app;
  if (!hasQuery(query)) return showNewest({ silent });
  if (!app.state.ready) return waitUntilReady(app.state);
  const controller = new AbortController();
  Object.assign(app, { searchAbort: controller, refreshedAt: Date.now(), stale: false });
  if (!app.answer) showEmpty('Searching…', '');
  $('results').setAttribute('aria-busy', !silent);
  $('more').disabled = !silent;
  const snapshot = { ...snapshotQuery(query), revision: app.state.revision };
  try {
    const response = await request('v1/search', { ...snapshot.body, ...(query.k && { k: query.k }) }, controller.signal);
    app.answer = { ...response, query: snapshot };
    renderAnswer(silent);
    if (query.explainedImage && !$('explain').open) openExplanation(query.explainedImage);
  } catch (problem) {
    if (controller.signal.aborted) return;
    app.stale = silent;
    if (!silent) showProblem(problem, runSearch);
  }
  $('results').setAttribute('aria-busy', false);
  $('more').disabled = false;
  renderRefreshButton();
}

/** Adds the next page of the results that are shown; if the server no longer has their version, searches again for more. */
async function loadMore() {
  const { answer } = app;
  if (!answer?.next_cursor) return;
  app.searchAbort?.abort();
  const controller = new AbortController();
  app.searchAbort = controller;
  $('more').disabled = true;
  try {
    const next = await request('v1/search', { ...answer.query.body, cursor: answer.next_cursor }, controller.signal);
    const firstNewImage = next.hits[0]?.image_id;
    app.answer = { ...answer, next_cursor: next.next_cursor, hits: [...answer.hits, ...next.hits], raw_hits: [...answer.raw_hits, ...next.raw_hits] };
    rememberResultCount(app.answer.hits.length);
    renderAnswer(false);
    $('balanced').querySelector(`[data-image-id="${CSS.escape(firstNewImage ?? '')}"] .card`)?.focus({ preventScroll: true });
  } catch (problem) {
    if (controller.signal.aborted) return;
    if (problem.status !== 410) return showProblem(problem, loadMore);
    rememberResultCount(answer.hits.length + PAGE_SIZE);
    runSearch();
  } finally {
    if (app.searchAbort === controller) $('more').disabled = false;
  }
}
function rememberResultCount(k) {
  app.query.k = Math.min(k, MAX_RESULTS);
  writeAddress(false);
}

/** Shows a text in place of results. */
function showEmpty(title, text) {
  app.answer = null;
  $('empty').replaceChildren(el('h2', {}, title), el('p', {}, text));
  [$('empty').hidden, $('newest').hidden, $('results').hidden] = [false, true, true];
}
function waitUntilReady({ ready, images }) {
  if (ready) return runSearch();
  showEmpty('The catalogue is loading', `${formatCount(images)} images so far. The search starts when all are loaded.`);
  app.retry = { at: Date.now() + 1000, action: () => loadState().then(() => waitUntilReady(app.state)) };
}

function showProblem(problem, action) {
  if (problem.status === 401) return; // the sign-in dialog is open
  if (problem.status === 503 && app.state) return waitUntilReady(Object.assign(app.state, { ready: false }));
  if (!app.answer) showEmpty('Nothing to show', '');
  const countdown = el('span', { class: 'number' });
  const title = el('b', {}, `${ERROR_TITLES[problem.status] ?? problem.title}: `);
  $('error').replaceChildren(el('p', {}, title, `${problem.detail} `, countdown), button('Try again', 'try-again', () => action()));
  $('error').hidden = false;
  app.retry = problem.retry_after ? { at: Date.now() + problem.retry_after * 1000, action, countdown } : null;
  tick();
}
const clearProblem = () => { $('error').hidden = true; app.retry = null; };

/* Answers */
function renderAnswer(silent) {
  clearProblem();
  const { hits, raw_hits, scanned, matched, normaliser, weight, warning } = app.answer;
  [$('warning').hidden, $('warning').textContent] = [!warning, warning ?? ''];
  if (!scanned) return showEmpty('The catalogue is empty', 'No image has been ingested yet.');
  if (!matched) return showEmpty('No image passes the filter', `The catalogue has ${formatCount(scanned)} images. Loosen or clear the filters above.`);
  [$('empty').hidden, $('newest').hidden, $('results').hidden] = [true, true, false];
  const plain = isPictureQuery(app.query) && (normaliser === 'raw' || weight === 0);
  $('results').dataset.plain = plain;
  $('balanced-name').textContent = plain ? 'Most similar' : 'Balanced';
  const balancedIds = new Set(hits.map((hit) => hit.image_id));
  const outBadge = (hit) => (balancedIds.has(hit.image_id) ? null : ['down', 'out', `rank ${hit.rank} when balanced`]);
  renderColumn($('raw'), raw_hits, (hit) => cardNodes(hit, hit.raw_rank, hit.raw_score, outBadge(hit)));
  renderColumn($('balanced'), hits, (hit) => cardNodes(hit, hit.rank, hit.score, plain ? null : rankMovement(hit, raw_hits.length)));
  $('balanced-settings').textContent = `${normaliserName(normaliser)}, weight ${weight.toFixed(2)}`;
  $('raw-right').textContent = rightSummary(app.answer, raw_hits);
  $('balanced-right').textContent = rightSummary(app.answer, hits);
  $('movement-summary').replaceChildren(...(plain ? [] : movementBadges(hits, raw_hits.length)));
  $('more').parentNode.hidden = !app.answer.next_cursor;
  $('status').setAttribute('aria-live', silent ? 'off' : 'polite');
  $('status').replaceChildren(...searchSummary(app.answer));
  renderNoMatch(app.answer);
}

function searchSummary({ hits, scanned, matched, timings, no_match }) {
  const { embed_ms, scan_ms, rank_ms } = timings;
  const embedding = embed_ms ? ` (+ ${embed_ms.toFixed(1)} ms for the query)` : '';
  const isFiltered = Object.keys(app.query.filters).length;
  const ranked = isFiltered ? `${formatCount(matched)} that pass the filter, of ${formatCount(scanned)} images` : `${formatCount(matched)} images`;
  const parts = [`${formatCount(hits.length)} best of ${ranked}, in ${(scan_ms + rank_ms).toFixed(1)} ms${embedding}`];
  if (app.query.text && !no_match) {
    const explanation = 'A threshold decides whether any image matches. It is measured for one configuration (bsap evaluate --calibrate live --store). None is stored for these settings, so the nearest pictures are shown whether they match or not.';
    parts.push(' · ', hintButton('match threshold not calibrated', explanation, 'uncalibrated'));
  }
  return parts;
}

/** Warns if the best hit scores no better than hits of unrelated texts do. */
function renderNoMatch({ no_match }) {
  const nothing = Boolean(no_match?.nothing_matches);
  $('no-match').hidden = !nothing;
  $('results').dataset.doubtful = nothing;
  if (!nothing) return;
  $('no-match').replaceChildren(el('b', {}, 'Probably nothing here matches'), `: ${no_match.reason}. The nearest pictures are shown nevertheless.`);
}
