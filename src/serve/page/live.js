/* The feed of changes, with their rate and lag. */

const [FEED_LENGTH, MAX_LAGS] = [30, 40];
const [RATE_BARS, RATE_BAR_MS] = [24, 2500]; // the chart shows the changes of a minute

function listenToChanges() {
  if ($('sign-in-dialog').open) return void setTimeout(listenToChanges, 1000);
  const events = new EventSource('v1/events');
  events.addEventListener('open', () => renderLive(true));
  events.addEventListener('error', () => {
    renderLive(false);
    if (events.readyState === EventSource.CLOSED) setTimeout(listenToChanges, 3000);
  });
  events.addEventListener('change', (event) => onCatalogueChange(JSON.parse(event.data)));
  events.addEventListener('missed', ({ data }) => {
    app.stale = true;
    countRecentChanges(Number(data) || 0);
  });
}

const renderLive = (connected) => {
  $('live').dataset.connected = connected;
  $('live').textContent = connected ? 'live' : 'offline';
};
function onCatalogueChange(change) {
  countRecentChanges(1);
  if (change.event_time) app.lags = [(Date.parse(change.searchable_at) - Date.parse(change.event_time)) / 1000, ...app.lags].slice(0, MAX_LAGS);
  Object.assign(app, { stale: true, changedAt: change.searchable_at, pendingChanges: [change, ...app.pendingChanges].slice(0, FEED_LENGTH) });
  renderFeed();
  renderRefreshButton();
}

/* Rate and lag */
function countRecentChanges(count) {
  const now = Date.now();
  app.recentChanges = [...app.recentChanges.filter(({ at }) => now - at < RATE_BARS * RATE_BAR_MS), { at: now, count }];
}
/** The numbers of waiting and of dead-lettered messages, and an explanation. */
function backlogSummary() {
  const { workers } = app.state ?? {};
  const alternative = 'See bsap status for waiting messages and bsap dead-letters for dead letters.';
  if (!workers) return ['unknown', `The query worker reads the table, not Kafka. ${alternative} Set http.worker_metrics_urls to the addresses of the workers’ metrics to see both here.`];
  const { discovered, responding, lag_messages, dead_letters, unreachable } = workers;
  if (!responding) return ['no worker responds', `Tried: ${unreachable.join(', ') || 'none yet'}. ${alternative}`];
  const source = responding < discovered ? `${responding} of ${discovered} workers respond; unreachable: ${unreachable.join(', ')}.` : `Reported by ${responding === 1 ? 'the worker' : `${responding} workers`}; dead letters since they started.`;
  return [`${lag_messages === null ? 'waiting unknown' : `${formatCount(lag_messages)} waiting`}, ${formatCount(dead_letters)} dead-lettered`, source];
}
function renderFeedMetrics() {
  const now = Date.now();
  const bars = new Array(RATE_BARS).fill(0);
  for (const { at, count } of app.recentChanges) {
    const bar = RATE_BARS - 1 - Math.floor((now - at) / RATE_BAR_MS);
    if (bar >= 0) bars[bar] += count;
  }
  const total = bars.reduce((sum, count) => sum + count, 0);
  const seconds = Math.min(RATE_BARS * RATE_BAR_MS, now - app.listeningSince) / 1000;
  const rate = `${formatCount(total)} in the last ${seconds < 60 ? `${Math.round(seconds)} s` : 'minute'}`;
  const max = Math.max(4, ...bars);
  const bar = (count, index) => svg('rect', { x: index * 10 + 1, y: 28 - (count / max) * 28, width: 8, height: Math.max(1, (count / max) * 28) });
  $('rate-chart').replaceChildren(...bars.map(bar));
  $('rate-chart').setAttribute('aria-label', `Changes: ${rate}`);
  const median = app.lags.toSorted((a, b) => a - b)[app.lags.length >> 1];
  const metrics = [
    ['Rate', rate, 'Images that were added, changed or deleted.'],
    ['Lag', median === undefined ? 'no event with a time yet' : `${formatDuration(Math.max(0, median))} to searchable`, 'From the time in an event until its image is searchable here: the median of the last changes whose events have a time.'],
    ['Waiting, dead letters', ...backlogSummary()],
  ];
  const metricNode = ([name, value, explanation]) => el('div', {}, el('dt', {}, hintButton(name, explanation, 'metric-name')), el('dd', {}, value));
  const next = metrics.map(metricNode);
  if ([...$('feed-metrics').children].some((node, index) => !node.isEqualNode(next[index])) || !$('feed-metrics').childElementCount) $('feed-metrics').replaceChildren(...next);
}

function renderFeed() {
  const pending = app.pendingChanges.length < FEED_LENGTH ? app.pendingChanges.length : `${FEED_LENGTH}+`;
  $('pause').setAttribute('aria-pressed', app.paused);
  $('pause').textContent = app.paused ? `Resume (${pending})` : 'Pause';
  if (app.paused) return;
  $('changes').prepend(...app.pendingChanges.splice(0).map(feedItem));
  [...$('changes').children].slice(FEED_LENGTH).forEach((item) => item.remove());
  $('no-changes').hidden = $('changes').childElementCount > 0;
}
function feedItem({ image_id, operation, is_new, picture, title, searchable_at }) {
  const [isDeleted, name] = [operation === 'delete', title ?? image_id];
  const action = el('span', { class: 'what' }, isDeleted ? 'deleted' : is_new ? 'added' : 'changed');
  const text = el('span', {}, el('span', { class: 'name' }, name), action, ' ', timeNode(searchable_at));
  return el('li', { class: `change ${operation}`, 'data-test': 'feed-item', title: `${name} (${image_id})` }, thumbnail(picture), text);
}

/** Whether results are refreshed automatically: not while the user pauses, reads an explanation, or has added pages of results. */
const shouldAutoRefresh = () => !app.paused && !$('explain').open && !document.hidden && !(app.answer?.hits.length > MAX_RESULTS);
const renderRefreshButton = () => { $('refresh').hidden = !app.stale || shouldAutoRefresh(); };
function autoRefresh() {
  const due = app.stale && shouldAutoRefresh() && Date.now() - app.refreshedAt >= REFRESH_MS;
  const isShown = app.answer || (app.query && !hasQuery(app.query));
  if (due && isShown && !app.retry && !$('more').disabled) runSearch({ silent: true });
}

function tick() {
  for (const node of document.querySelectorAll('time')) node.textContent = formatAge(node.dateTime);
  renderFeedMetrics();
  autoRefresh();
  const { retry } = app;
  if (!retry) return;
  if (retry.countdown) retry.countdown.textContent = `– trying again in ${Math.max(0, Math.ceil((retry.at - Date.now()) / 1000))} s`;
  if (Date.now() < retry.at) return;
  app.retry = null;
  retry.action();
}

