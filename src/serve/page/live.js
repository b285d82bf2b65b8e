/* What comes in: changes as they are committed, their pace, and how long they took. */

const [FEED_LENGTH, MAX_DELAYS, PULSE_BARS] = [30, 40, 24]; // PULSE_BARS: bars of PULSE_MS each
const PULSE_MS = 2500;

function listenToChanges() {
  if ($('gate').open) return void setTimeout(listenToChanges, 1000);
  const events = new EventSource('/v1/events');
  events.addEventListener('open', () => renderLive(true));
  events.addEventListener('error', () => {
    renderLive(false);
    if (events.readyState === EventSource.CLOSED) setTimeout(listenToChanges, 3000);
  });
  events.addEventListener('change', (event) => onCatalogueChange(JSON.parse(event.data)));
  events.addEventListener('missed', ({ data }) => {
    app.stale = true;
    recordArrivals(Number(data) || 0);
  });
}

const renderLive = (connected) => {
  $('live').dataset.connected = connected;
  $('live').textContent = connected ? 'live' : 'offline';
};
function onCatalogueChange(change) {
  recordArrivals(1);
  if (change.event_time) app.delays = [(Date.parse(change.searchable_at) - Date.parse(change.event_time)) / 1000, ...app.delays].slice(0, MAX_DELAYS);
  Object.assign(app, { stale: true, changedAt: change.searchable_at, held: [change, ...app.held].slice(0, FEED_LENGTH) });
  renderFeed();
  renderRefreshButton();
}

/* Pace */
function recordArrivals(changes) {
  const now = Date.now();
  app.arrivals = [...app.arrivals.filter(({ at }) => now - at < PULSE_BARS * PULSE_MS), { at: now, changes }];
}
/** What the workers tell of what waits and what was put aside, and why that is so. */
function backlogSummary() {
  const { workers } = app.state ?? {};
  const elsewhere = 'bsap status and bsap dead-letters tell what waits and what was put aside.';
  if (!workers) return ['not seen from here', `The query worker reads the table, not Kafka. ${elsewhere} Shown here where http.worker_metrics_urls names the workers’ metrics.`];
  const { discovered, responding, lag_messages, dead_letters, unreachable } = workers;
  if (!responding) return ['no worker answers', `Asked: ${unreachable.join(', ') || 'none yet'}. ${elsewhere}`];
  const who = responding < discovered ? `${responding} of ${discovered} workers answer; unreachable: ${unreachable.join(', ')}.` : `Reported by ${responding === 1 ? 'the worker' : `${responding} workers`}; dead letters since they started.`;
  return [`${lag_messages === null ? 'waiting unknown' : `${formatCount(lag_messages)} waiting`}, ${formatCount(dead_letters)} put aside`, who];
}
function renderPace() {
  const now = Date.now();
  const bars = new Array(PULSE_BARS).fill(0);
  for (const { at, changes } of app.arrivals) {
    const bar = PULSE_BARS - 1 - Math.floor((now - at) / PULSE_MS);
    if (bar >= 0) bars[bar] += changes;
  }
  const total = bars.reduce((sum, size) => sum + size, 0);
  const listened = Math.min(PULSE_BARS * PULSE_MS, now - app.listeningSince) / 1000;
  const rate = `${formatCount(total)} in the last ${listened < 60 ? `${Math.round(listened)} s` : 'minute'}`;
  const most = Math.max(4, ...bars);
  const bar = (size, index) => svg('rect', { x: index * 10 + 1, y: 28 - (size / most) * 28, width: 8, height: Math.max(1, (size / most) * 28) });
  $('pulse').replaceChildren(...bars.map(bar));
  $('pulse').setAttribute('aria-label', `Changes: ${rate}`);
  const middle = app.delays.toSorted((a, b) => a - b)[app.delays.length >> 1];
  const facts = [
    ['Rate', rate, 'Images added, changed and deleted.'],
    ['Lag', middle === undefined ? 'no timed event yet' : `${formatDuration(Math.max(0, middle))} to searchable`, 'From the time that an event carries until its image is searchable here: the middle of the last changes that carry one.'],
    ['Waiting, dead letters', ...backlogSummary()],
  ];
  const fact = ([name, value, why]) => el('div', {}, el('dt', {}, hintButton(name, why, 'pace-name')), el('dd', {}, value));
  const next = facts.map(fact);
  if ([...$('pace').children].some((node, index) => !node.isEqualNode(next[index])) || !$('pace').childElementCount) $('pace').replaceChildren(...next);
}

function renderFeed() {
  const held = app.held.length < FEED_LENGTH ? app.held.length : `${FEED_LENGTH}+`;
  $('pause').setAttribute('aria-pressed', app.paused);
  $('pause').textContent = app.paused ? `Resume (${held})` : 'Pause';
  if (app.paused) return;
  $('changes').prepend(...app.held.splice(0).map(feedItem));
  [...$('changes').children].slice(FEED_LENGTH).forEach((item) => item.remove());
  $('no-changes').hidden = $('changes').childElementCount > 0;
}
function feedItem({ image_id, operation, is_new, picture, title, searchable_at }) {
  const [deleted, name] = [operation === 'delete', title ?? image_id];
  const what = el('span', { class: 'what' }, deleted ? 'deleted' : is_new ? 'added' : 'changed');
  const words = el('span', {}, el('span', { class: 'name' }, name), what, ' ', timeNode(searchable_at));
  return el('li', { class: `change ${operation}`, 'data-test': 'feed-item', title: `${name} (${image_id})` }, thumbnail(picture), words);
}

/** Results follow the catalogue by themselves, unless somebody is looking closely. */
const shouldAutoRefresh = () => !app.paused && !$('explain').open && !document.hidden && !(app.answer?.hits.length > MAX_RESULTS);
const renderRefreshButton = () => { $('refresh').hidden = !app.stale || shouldAutoRefresh(); };
function autoRefresh() {
  const due = app.stale && shouldAutoRefresh() && Date.now() - app.refreshedAt >= REFRESH_MS;
  if (due && app.answer && !app.retry && !$('more').disabled) runSearch({ silent: true });
}

function tick() {
  for (const node of document.querySelectorAll('time')) node.textContent = formatAge(node.dateTime);
  renderPace();
  autoRefresh();
  const { retry } = app;
  if (!retry) return;
  if (retry.words) retry.words.textContent = `– trying again in ${Math.max(0, Math.ceil((retry.at - Date.now()) / 1000))} s`;
  if (Date.now() < retry.at) return;
  app.retry = null;
  retry.action();
}

