/* Signing in, if the server requires a key. Scripts cannot read the session cookie: the page knows only whose session it is. */

/** The session until the server has responded, and if it requires no key. */
const ANONYMOUS_SESSION = { api_key_name: null, scopes: ['search', 'feedback', 'admin'] };
const hasScope = (scope) => (app.session ?? ANONYMOUS_SESSION).scopes.includes(scope);

function askForKey() {
  if ($('sign-in-dialog').open) return;
  $('key-problem').hidden = true;
  $('sign-in-dialog').showModal();
}

async function signIn(event) {
  event.preventDefault();
  $('sign-in').disabled = true;
  try {
    app.session = await request('v1/session', { api_key: $('key').value.trim() });
    $('key').value = '';
    $('sign-in-dialog').close();
    renderSession();
    await (app.state ? runSearch() : startPage());
  } catch (problem) {
    $('key-problem').textContent = `${problem.title}: ${problem.detail}`;
    $('key-problem').hidden = false;
    $('key').select();
  } finally {
    $('sign-in').disabled = false;
  }
}

async function signOut() {
  await fetch('v1/session', { method: 'DELETE' }).catch(() => null);
  location.reload();
}

function renderSession() {
  const { api_key_name } = app.session;
  $('session').hidden = !api_key_name;
  $('session').replaceChildren(...(api_key_name ? [`${api_key_name} `, button('Sign out', 'sign-out', signOut)] : []));
}
