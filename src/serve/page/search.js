/* Searching, and what is said about it. */

const REFRESH_MS = 3000;
/** Results that are asked for at once, and so come back by a link; more are added page by page. */
const MAX_RESULTS = 240;
/** Results that are added where a page has to be asked for anew. */
const PAGE_SIZE = 24;
const ERROR_TITLES = { 404: 'Not there', 422: 'This cannot be searched', 429: 'Busy' }; // by status, where the server's title says little

/* State of the server */
async function loadState() {
  app.state = await request('/v1/state').catch((problem) => app.state ?? showProblem(problem, startPage)) ?? null;
  if (!app.state) return;
  renderState();
  renderChoices();
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

/** Whether another version of the table, or another configuration, is there: changes may have gone unheard. */
const isOutdated = (answer) => answer && (answer.asked.revision !== app.state.revision
  || (answer.generation === app.state.generation && answer.table_version < app.state.table_version));

/** How the candidate fares beside what is live. */
function renderCandidate() {
  const { candidate, configuration, traffic } = app.state;
  $('trial').hidden = !candidate;
  if (!candidate) return;
  const percent = (share) => `${Math.round(share * 1000) / 10} %`;
  const { live, candidate: tried, shadow_queries, mean_overlap, top_hit_changed } = traffic;
  const shadow = shadow_queries
    ? ` In the shadow of ${formatCount(shadow_queries)}: ${percent(mean_overlap)} of the results in common, another best result in ${formatCount(top_hit_changed)}.`
    : candidate.shadow_share ? ` In the shadow of ${percent(candidate.shadow_share)} of the queries: none yet.` : '';
  $('trial').replaceChildren(
    el('b', {}, candidate.name), ' against ', el('b', {}, configuration), `: queries answered ${formatCount(tried)} to ${formatCount(live)}`,
    candidate.traffic_share ? ` (its share: ${percent(candidate.traffic_share)}).` : ' (only on request).', shadow);
}

/** Runs the query. `silent`: nobody asked for it, so nothing is announced and problems wait. */
async function runSearch({ silent = false } = {}) {
  app.running?.abort();
  if (!silent) clearProblem();
  const { query } = app;
  if (!query.text && !isPictureQuery(query)) return showEmpty('Search the catalogue', 'Type what a picture should show, pick an example, or drop a picture anywhere on this page. The ranking of plain CLIP stands next to the balanced one, with what moved.');
  if (!app.state.ready) return waitUntilReady(app.state);
  const running = new AbortController();
  Object.assign(app, { running, refreshedAt: Date.now(), stale: false });
  if (!app.answer) showEmpty('Searching…', '');
  $('results').setAttribute('aria-busy', !silent);
  $('more').disabled = !silent;
  const belongs = { ...snapshotQuery(query), revision: app.state.revision };
  try {
    const answer = await request('/v1/search', { ...belongs.question, ...(query.k && { k: query.k }) }, running.signal);
    app.answer = { ...answer, asked: belongs };
    renderAnswer(silent);
    if (query.explained && !$('explain').open) openExplanation(query.explained);
  } catch (problem) {
    if (running.signal.aborted) return;
    app.stale = silent;
    if (!silent) showProblem(problem, runSearch);
  }
  $('results').setAttribute('aria-busy', false);
  $('more').disabled = false;
  renderRefreshButton();
}

/** Adds the next page, of the very version that is shown; where that is not held any more, asks anew. */
async function loadMore() {
  const { answer } = app;
  if (!answer?.next_cursor) return;
  app.running?.abort();
  const running = new AbortController();
  app.running = running;
  $('more').disabled = true;
  try {
    const next = await request('/v1/search', { ...answer.asked.question, cursor: answer.next_cursor }, running.signal);
    const first = next.hits[0]?.image_id;
    app.answer = { ...answer, next_cursor: next.next_cursor, hits: [...answer.hits, ...next.hits], raw_hits: [...answer.raw_hits, ...next.raw_hits] };
    rememberResultCount(app.answer.hits.length);
    renderAnswer(false);
    $('balanced').querySelector(`[data-image-id="${CSS.escape(first ?? '')}"] .card`)?.focus({ preventScroll: true });
  } catch (problem) {
    if (running.signal.aborted) return;
    if (problem.status !== 410) return showProblem(problem, loadMore);
    rememberResultCount(answer.hits.length + PAGE_SIZE);
    runSearch();
  } finally {
    if (app.running === running) $('more').disabled = false;
  }
}
function rememberResultCount(k) {
  app.query.k = Math.min(k, MAX_RESULTS);
  writeAddress(false);
}

/** Shows words in place of results. */
function showEmpty(title, words) {
  app.answer = null;
  $('empty').replaceChildren(el('h2', {}, title), el('p', {}, words));
  [$('empty').hidden, $('results').hidden] = [false, true];
}
function waitUntilReady({ ready, images }) {
  if (ready) return runSearch();
  showEmpty('The catalogue is loading', `${formatCount(images)} images so far. The search runs once all are there.`);
  app.retry = { at: Date.now() + 1000, action: () => loadState().then(() => waitUntilReady(app.state)) };
}

function showProblem(problem, action) {
  if (problem.status === 401) return; // the form to sign in is open
  if (problem.status === 503 && app.state) return waitUntilReady(Object.assign(app.state, { ready: false }));
  if (!app.answer) showEmpty('Nothing to show', '');
  const words = el('span', { class: 'number' });
  const title = el('b', {}, `${ERROR_TITLES[problem.status] ?? problem.title}: `);
  $('error').replaceChildren(el('p', {}, title, `${problem.detail} `, words), button('Try again', 'try-again', () => action()));
  $('error').hidden = false;
  app.retry = problem.retry_after ? { at: Date.now() + problem.retry_after * 1000, action, words } : null;
  tick();
}
const clearProblem = () => { $('error').hidden = true; app.retry = null; };

/* Answers */
function renderAnswer(silent) {
  clearProblem();
  const { hits, raw_hits, scanned, matched, normaliser, weight, warning } = app.answer;
  [$('warning').hidden, $('warning').textContent] = [!warning, warning ?? ''];
  if (!scanned) return showEmpty('The catalogue is empty', 'No image has been ingested yet. They appear here as they come.');
  if (!matched) return showEmpty('No image passes the filter', `${formatCount(scanned)} images are there. Loosen or clear the filters above.`);
  [$('empty').hidden, $('results').hidden] = [true, false];
  const plain = isPictureQuery(app.query) && (normaliser === 'raw' || weight === 0);
  $('results').dataset.plain = plain;
  $('balanced-name').textContent = plain ? 'Most alike' : 'Balanced';
  const kept = new Set(hits.map((hit) => hit.image_id));
  const out = (hit) => (kept.has(hit.image_id) ? null : ['down', 'out', `place ${hit.rank} when balanced`]);
  renderColumn($('raw'), raw_hits, (hit) => cardNodes(hit, hit.raw_rank, hit.raw_score, out(hit)));
  renderColumn($('balanced'), hits, (hit) => cardNodes(hit, hit.rank, hit.score, plain ? null : rankMovement(hit, raw_hits.length)));
  $('how').textContent = `${normaliserName(normaliser)}, weight ${weight.toFixed(2)}`;
  $('moves').replaceChildren(...(plain ? [] : movementBadges(hits, raw_hits.length)));
  $('more').parentNode.hidden = !app.answer.next_cursor;
  $('status').setAttribute('aria-live', silent ? 'off' : 'polite');
  $('status').replaceChildren(...searchSummary(app.answer));
  renderNoMatch(app.answer);
}

function searchSummary({ hits, scanned, matched, timings, no_match }) {
  const { embed_ms, scan_ms, rank_ms } = timings;
  const text = embed_ms ? ` (+ ${embed_ms.toFixed(1)} ms for the query)` : '';
  const filtered = Object.keys(app.query.filters).length;
  const all = filtered ? `${formatCount(matched)} that pass the filter, of ${formatCount(scanned)} images` : `${formatCount(matched)} images`;
  const words = [`${formatCount(hits.length)} best of ${all}, in ${(scan_ms + rank_ms).toFixed(1)} ms${text}`];
  if (app.query.text && !no_match) {
    const why = 'Whether anything matches at all is judged by a threshold that is measured for one configuration (bsap evaluate --calibrate live --store). None is stored for these settings, so the nearest pictures are shown whether they match or not.';
    words.push(' · ', hintButton('match threshold not calibrated', why, 'uncalibrated'));
  }
  return words;
}

/** In plain words, that the best hit is no better than what unrelated texts reach. */
function renderNoMatch({ no_match }) {
  const nothing = Boolean(no_match?.nothing_matches);
  $('no-match').hidden = !nothing;
  $('results').dataset.doubtful = nothing;
  if (!nothing) return;
  $('no-match').replaceChildren(el('b', {}, 'Probably nothing here matches'), `: ${no_match.reason}. The nearest pictures are shown all the same.`);
}
