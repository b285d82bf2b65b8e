/* What is asked, its address, and the controls that change it. */

const NORMALISERS = {
  raw: ['Raw', 'Raw: the score of plain CLIP as it is; the weight changes nothing.'],
  softmax: ['Softmax', 'Softmax: the score minus a soft maximum of what the image scores on the auxiliary prompts.'],
  zscore: ['Z-score', 'Z-score: how many standard deviations the score lies above the image’s own mean.'],
  range: ['Range', 'Range: where the score lies between the image’s own lowest and highest.'],
  nnn: ['NNN', 'NNN: the score minus the mean of the image’s strongest auxiliary prompts.'],
};
const PLAIN_PICTURES = 'Pictures are ranked by plain CLIP, unless you choose a normaliser: what an image scores with texts says little of what it scores with pictures.';
/** Settings that are null are as served. */
const AS_SERVED = { normaliser: null, weight: null, set: null };
/** Of text, like (an image's id) and picture (a file in base64) one says what to look for. */
const NOTHING = {
  text: '', like: '', picture: '', ...AS_SERVED, configuration: '', filters: {}, k: null, shown: 'balanced', explained: '',
};
const normaliserName = (value) => NORMALISERS[value]?.[0] ?? value;
const byPicture = (query) => Boolean(query.like || query.picture);
const isChosen = ({ normaliser, weight, set }) => [normaliser, weight, set].some((value) => value !== null);

/** The settings that hold for a query: those chosen, else as its configuration serves. */
function settings(query) {
  const { serving, candidate, prompt_sets } = app.state;
  const served = query.configuration && candidate?.name === query.configuration ? candidate.serving : serving;
  const set = (prompt_sets.find(({ key }) => key === served.prompt_set) ?? prompt_sets[0])?.name ?? '';
  const standard = byPicture(query) && !isChosen(query)
    ? { normaliser: 'raw', weight: 0, set }
    : { normaliser: served.normaliser, weight: Number(served.weight.toFixed(2)), set };
  const chosen = Object.entries(query).filter(([name, value]) => name in AS_SERVED && value !== null);
  return { ...standard, ...Object.fromEntries(chosen) };
}

/** The query as the server takes it; what is as served is left out. */
function question({ text, like, picture, normaliser, weight, set, configuration, filters }) {
  const filter = filterOf(filters);
  return {
    ...(picture ? { image: picture } : like ? { image_id: like } : { text }),
    ...(normaliser !== null && { normaliser }),
    ...(weight !== null && { weight }),
    ...(set !== null && { prompt_set: set }),
    ...(configuration && { configuration }),
    ...(filter && { filter }),
  };
}

/** What an answer goes on belonging to while something else is asked. */
const asked = (query) => ({ text: query.text, own: isChosen(query), question: question(query) });

/* The address: everything that is asked. A picture is in its fragment, which servers do not see. */
function readAddress() {
  const asked = new URLSearchParams(location.search);
  const known = (name, list) => (list.includes(asked.get(name)) ? asked.get(name) : null);
  const [weight, k] = ['weight', 'k'].map((name) => Number.parseFloat(asked.get(name)));
  const like = asked.get('like') ?? '';
  const picture = like ? '' : new URLSearchParams(location.hash.slice(1)).get('picture') ?? '';
  app.query = {
    ...NOTHING,
    text: like || picture ? '' : (asked.get('q') ?? '').trim(),
    like,
    picture: picture.replaceAll('-', '+').replaceAll('_', '/').padEnd(Math.ceil(picture.length / 4) * 4, '='),
    normaliser: known('normaliser', app.state.normalisers),
    weight: Number.isFinite(weight) ? clamp(weight, 0, 1) : null,
    set: known('set', app.state.prompt_sets.map(({ name }) => name)),
    configuration: known('configuration', [app.state.candidate?.name]) ?? '',
    filters: filtersFrom(asked),
    k: Number.isFinite(k) ? clamp(Math.round(k), 1, MOST_AT_ONCE) : null,
    shown: asked.get('shown') === 'raw' ? 'raw' : 'balanced',
    explained: asked.get('image') ?? '',
  };
  renderQuery();
}

function addressOf({ text, like, picture, normaliser, weight, set, configuration, filters, k, shown, explained }) {
  const address = new URLSearchParams();
  const put = (name, value) => { if (value !== null && value !== '') address.set(name, value); };
  put('q', text);
  put('like', like);
  put('configuration', configuration);
  Object.entries({ normaliser, weight, set }).forEach(([name, value]) => put(name, value));
  for (const [name, value] of filtersTo(filters)) address.append(name, value);
  put('k', k);
  put('shown', shown === 'raw' ? shown : '');
  put('image', explained);
  const fragment = picture ? `#picture=${picture.replaceAll('+', '-').replaceAll('/', '_').replaceAll('=', '')}` : '';
  return `${location.pathname}?${address}${fragment}`;
}

/** Writes the address. `keep`: the back button comes back to what was there before. */
function writeAddress(keep) {
  const address = addressOf(app.query);
  if (address === location.pathname + location.search + location.hash) return;
  history[keep ? 'pushState' : 'replaceState'](null, '', address);
}

/** Asks something else. What was shown beyond the first page is not asked for again. */
function change(difference, keep = true) {
  if (!app.state) return;
  const typed = $('q').value.trim();
  const subject = byPicture(app.query) && !typed ? {} : { text: typed, like: '', picture: '' };
  app.query = { ...app.query, ...subject, k: null, explained: '', ...difference };
  if (!byPicture(app.query)) forgetServed(app.query);
  writeAddress(keep);
  renderQuery();
  clearTimeout(app.soon);
  app.soon = setTimeout(run, 80);
}

/** Settings that are as served anyway are not asked for: only such queries count for what is served. */
function forgetServed(query) {
  const served = settings({ ...query, ...AS_SERVED });
  for (const name of Object.keys(AS_SERVED)) if (query[name] === served[name]) query[name] = null;
}

/** Looks for what is like an image of the catalogue. */
function moreLike(hit) {
  $('q').value = '';
  if ($('explain').open) $('explain').close();
  change({ text: '', picture: '', like: hit.image_id });
  scrollTo({ top: 0, behavior: calm() ? 'auto' : 'smooth' });
}

/* Controls */
/** What changes seldom: only where it has changed, so that nobody's choice is interrupted. */
function renderChoices() {
  const { stand_ins, examples, normalisers, prompt_sets, candidate, configuration, attributes } = app.state;
  const choices = JSON.stringify([stand_ins, examples, normalisers, prompt_sets, candidate?.name, configuration, attributes.map(({ name }) => name)]);
  if (renderChoices.last === choices) return;
  renderChoices.last = choices;
  $('stand-ins').hidden = !stand_ins.length;
  const standIn = ({ what, real }) => el('li', {}, `${what}. For the real one, set `, el('code', {}, real), '.');
  $('stand-ins').querySelector('ul').replaceChildren(...stand_ins.map(standIn));
  const chip = (text) => el('button', { type: 'button', class: 'chip', 'data-test': 'example', onclick: () => { $('q').value = text; change({}); } }, text);
  $('examples').replaceChildren(...examples.map(chip));
  $('examples').hidden = !examples.length;
  renderSegments('normaliser', normalisers.map((value) => [value, normaliserName(value)]));
  $('configuration').hidden = !candidate;
  renderSegments('configuration', [['', `Live: ${configuration}`], ...(candidate ? [[candidate.name, `Candidate: ${candidate.name}`]] : [])]);
  const option = ({ name, prompts, language }) => el('option', { value: name }, `${name} (${prompts}, ${language})`);
  $('set').replaceChildren(...prompt_sets.map(option));
  renderFilterChoices();
  if (!app.query) return;
  renderQuery();
  if (app.query.configuration && app.query.configuration !== candidate?.name) {
    toast(`${app.query.configuration} is no candidate any more`);
    change({ configuration: '' });
  }
}
function renderSegments(name, choices) {
  const segment = ([value, words]) => el('label', {}, words, el('input', { type: 'radio', name, value, 'data-test': `${name}-${value || 'live'}` }));
  $(name).querySelector('.segments').replaceChildren(...choices.map(segment));
}

function renderQuery() {
  const { query } = app;
  const { normaliser, weight, set } = settings(query);
  if (query.text || !$('q').matches(':focus')) $('q').value = query.text;
  [$('weight').value, $('set').value] = [weight, set];
  for (const choice of $('normaliser').querySelectorAll('input')) choice.checked = choice.value === normaliser;
  for (const choice of $('configuration').querySelectorAll('input')) choice.checked = choice.value === query.configuration;
  for (const choice of $('tabs').querySelectorAll('input')) choice.checked = choice.value === query.shown;
  $('columns').dataset.shown = query.shown;
  const words = { 0: '0 = plain CLIP', 1: '1 = the normaliser alone' };
  $('weight-words').textContent = words[weight] ?? `${weight.toFixed(2)} (${words[0]})`;
  $('how-short').textContent = `${normaliserName(normaliser)}, weight ${weight.toFixed(2)}, ${set}`;
  $('hint').textContent = byPicture(query) && !isChosen(query) ? PLAIN_PICTURES : NORMALISERS[normaliser]?.[1] ?? '';
  $('reset').disabled = !isChosen(query) && !query.configuration;
  renderSubject();
  renderFilters();
  document.title = query.text ? `${query.text} – bsap` : byPicture(query) ? 'Like a picture – bsap' : 'bsap';
}
