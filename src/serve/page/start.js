/* Event handlers, and the start of the page. */

function focusSearch(event) {
  const typing = event.target.matches('input:not([type=checkbox], [type=radio], [type=range])') || event.ctrlKey || event.metaKey || event.altKey;
  if (event.key !== '/' || typing || $('explain').open) return;
  event.preventDefault();
  $('q').select();
}

function bindEvents() {
  const on = (id, type, action) => $(id).addEventListener(type, action);
  on('sign-in-dialog', 'submit', signIn);
  on('sign-in-dialog', 'cancel', (event) => event.preventDefault()); // without a key the page has nothing to show
  on('search', 'submit', (event) => { event.preventDefault(); changeQuery({}); });
  on('configuration', 'change', (event) => changeQuery({ ...UNSET_SETTINGS, configuration: event.target.value }));
  on('normaliser', 'change', (event) => changeQuery({ normaliser: event.target.value }));
  on('weight', 'input', () => changeQuery({ weight: Number($('weight').value) }, false));
  on('set', 'change', () => changeQuery({ promptSet: $('set').value }));
  on('reset', 'click', () => changeQuery({ ...UNSET_SETTINGS, configuration: '' }));
  on('tabs', 'change', (event) => {
    app.query.ranking = $('columns').dataset.shown = event.target.value;
    writeAddress(false);
  });
  on('refresh', 'click', () => runSearch());
  on('more', 'click', loadMore);
  on('link', 'click', () => toast(copyText(location.href) ? 'Link copied' : 'The link cannot be copied here; it is in the address bar'));
  on('pause', 'click', () => { app.paused = !app.paused; renderFeed(); renderRefreshButton(); });
  on('copy', 'click', copyExplanation);
  on('close', 'click', () => $('explain').close());
  on('explain', 'close', onExplanationClosed);
  on('explain', 'click', (event) => { if (event.target === $('explain')) $('explain').close(); });
  for (const type of ['pointerover', 'focusin', 'pointerleave', 'focusout']) on('columns', type, highlightSameImage);
  for (const id of ['columns', 'newest']) on(id, 'keydown', moveFocusByArrowKey);
  document.addEventListener('keydown', focusSearch);
  document.addEventListener('keydown', closeDrawers);
  document.addEventListener('pointerdown', closeDrawers);
  bindPictureInput();
  setInterval(tick, 500);
  window.addEventListener('popstate', onPopState);
}

function onPopState() {
  if (!app.state) return;
  readAddress();
  $('explain').close(); // it explains the earlier query
  runSearch();
}

async function startPage() {
  clearProblem();
  await loadState();
  if (!app.state) return;
  app.session = await request('v1/session').catch(() => ANONYMOUS_SESSION);
  renderSession();
  const typed = app.hasEarlyChange ? $('q').value : '';
  readAddress();
  if (typed) {
    $('q').value = typed;
    changeQuery({});
  } else runSearch();
  setInterval(loadState, 2000);
}
if (matchMedia('(max-width: 720px)').matches) $('settings').open = false;
bindEvents();
listenToChanges();
startPage();
