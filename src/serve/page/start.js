/* What is listened to, and the beginning. */

function focusSearch(event) {
  const typing = event.target.matches('input:not([type=checkbox], [type=radio], [type=range])') || event.ctrlKey || event.metaKey || event.altKey;
  if (event.key !== '/' || typing || $('explain').open) return;
  event.preventDefault();
  $('q').select();
}

function bind() {
  const on = (id, type, action) => $(id).addEventListener(type, action);
  on('gate', 'submit', signIn);
  on('gate', 'cancel', (event) => event.preventDefault()); // there is nothing to see without
  on('search', 'submit', (event) => { event.preventDefault(); change({}); });
  on('configuration', 'change', (event) => change({ ...AS_SERVED, configuration: event.target.value }));
  on('normaliser', 'change', (event) => change({ normaliser: event.target.value }));
  on('weight', 'input', () => change({ weight: Number($('weight').value) }, false));
  on('set', 'change', () => change({ set: $('set').value }));
  on('reset', 'click', () => change({ ...AS_SERVED, configuration: '' }));
  on('tabs', 'change', (event) => {
    app.query.shown = $('columns').dataset.shown = event.target.value;
    writeAddress(false);
  });
  on('refresh', 'click', () => run());
  on('more', 'click', more);
  on('link', 'click', () => toast(copy(location.href) ? 'Link copied: it brings this view back' : 'Cannot copy here; the address bar has the link'));
  on('pause', 'click', () => { app.paused = !app.paused; renderFeed(); renderStale(); });
  on('copy', 'click', copyExplanation);
  on('close', 'click', () => $('explain').close());
  on('explain', 'close', explainClosed);
  on('explain', 'click', (event) => { if (event.target === $('explain')) $('explain').close(); });
  for (const type of ['pointerover', 'focusin', 'pointerleave', 'focusout']) on('columns', type, highlight);
  on('columns', 'keydown', walk);
  document.addEventListener('keydown', focusSearch);
  document.addEventListener('keydown', closeDrawers);
  document.addEventListener('pointerdown', closeDrawers);
  takePictures();
  setInterval(tick, 500);
  window.addEventListener('popstate', goBack);
}

function goBack() {
  if (!app.state) return;
  readAddress();
  $('explain').close(); // it belongs to what was asked before
  run();
}

async function start() {
  clearProblem();
  await loadState();
  if (!app.state) return;
  app.session = await request('/v1/session').catch(() => NOBODY);
  renderSession();
  readAddress();
  run();
  setInterval(loadState, 2000);
}
if (matchMedia('(max-width: 720px)').matches) $('settings').open = false;
bind();
listen();
start();
