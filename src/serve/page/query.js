/* What is asked, its address, and the controls that change it. */

const NORMALISERS = {
  raw: ['Raw', 'Raw: the score of plain CLIP as it is; the weight changes nothing.'],
  softmax: ['Softmax', 'Softmax: the score minus a soft maximum of what the image scores on the auxiliary prompts.'],
  zscore: ['Z-score', 'Z-score: how many standard deviations the score lies above the image’s own mean.'],
  range: ['Range', 'Range: where the score lies between the image’s own lowest and highest.'],
  nnn: ['NNN', 'NNN: the score minus the mean of the image’s strongest auxiliary prompts.'],
};
const PLAIN_PICTURES_HINT = 'Pictures are ranked by plain CLIP, unless you choose a normaliser: what an image scores with texts says little of what it scores with pictures.';
/** Settings that are null are as served. */
const UNSET_SETTINGS = { normaliser: null, weight: null, set: null };
/** Of text, like (an image's id) and picture (a file in base64) one says what to look for. */
const EMPTY_QUERY = {
  text: '', like: '', picture: '', ...UNSET_SETTINGS, configuration: '', filters: {}, k: null, shown: 'balanced', explained: '',
};
const normaliserName = (value) => NORMALISERS[value]?.[0] ?? value;
const isPictureQuery = (query) => Boolean(query.like || query.picture);
const hasOwnSettings = ({ normaliser, weight, set }) => [normaliser, weight, set].some((value) => value !== null);

/** The settings that hold for a query: those chosen, else as its configuration serves. */
function effectiveSettings(query) {
  const { serving, candidate, prompt_sets } = app.state;
  const served = query.configuration && candidate?.name === query.configuration ? candidate.serving : serving;
  const set = (prompt_sets.find(({ key }) => key === served.prompt_set) ?? prompt_sets[0])?.name ?? '';
  const standard = isPictureQuery(query) && !hasOwnSettings(query)
    ? { normaliser: 'raw', weight: 0, set }
    : { normaliser: served.normaliser, weight: Number(served.weight.toFixed(2)), set };
  const chosen = Object.entries(query).filter(([name, value]) => name in UNSET_SETTINGS && value !== null);
  return { ...standard, ...Object.fromEntries(chosen) };
}

/** The query as the server takes it; what is as served is left out. */
function requestBody({ text, like, picture, normaliser, weight, set, configuration, filters }) {
  const filter = buildFilter(filters);
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
const snapshotQuery = (query) => ({ text: query.text, overrides: hasOwnSettings(query), question: requestBody(query) });

/* The address: everything that is asked. A picture is in its fragment, which servers do not see. */
function readAddress() {
  const asked = new URLSearchParams(location.search);
  const known = (name, list) => (list.includes(asked.get(name)) ? asked.get(name) : null);
  const [weight, k] = ['weight', 'k'].map((name) => Number.parseFloat(asked.get(name)));
  const like = asked.get('like') ?? '';
  const picture = like ? '' : new URLSearchParams(location.hash.slice(1)).get('picture') ?? '';
  app.query = {
    ...EMPTY_QUERY,
    text: like || picture ? '' : (asked.get('q') ?? '').trim(),
    like,
    picture: picture.replaceAll('-', '+').replaceAll('_', '/').padEnd(Math.ceil(picture.length / 4) * 4, '='),
    normaliser: known('normaliser', app.state.normalisers),
    weight: Number.isFinite(weight) ? clamp(weight, 0, 1) : null,
    set: known('set', app.state.prompt_sets.map(({ name }) => name)),
    configuration: known('configuration', [app.state.candidate?.name]) ?? '',
    filters: filtersFromParameters(asked),
    k: Number.isFinite(k) ? clamp(Math.round(k), 1, MAX_RESULTS) : null,
    shown: asked.get('shown') === 'raw' ? 'raw' : 'balanced',
    explained: asked.get('image') ?? '',
  };
  renderQuery();
}

function buildAddress({ text, like, picture, normaliser, weight, set, configuration, filters, k, shown, explained }) {
  const address = new URLSearchParams();
  const put = (name, value) => { if (value !== null && value !== '') address.set(name, value); };
  put('q', text);
  put('like', like);
  put('configuration', configuration);
  Object.entries({ normaliser, weight, set }).forEach(([name, value]) => put(name, value));
  for (const [name, value] of filtersToParameters(filters)) address.append(name, value);
  put('k', k);
  put('shown', shown === 'raw' ? shown : '');
  put('image', explained);
  const fragment = picture ? `#picture=${picture.replaceAll('+', '-').replaceAll('/', '_').replaceAll('=', '')}` : '';
  return `${location.pathname}?${address}${fragment}`;
}

/** Writes the address. `keep`: the back button comes back to what was there before. */
function writeAddress(keep) {
  const address = buildAddress(app.query);
  if (address === location.pathname + location.search + location.hash) return;
  history[keep ? 'pushState' : 'replaceState'](null, '', address);
}

/** Asks something else. What was shown beyond the first page is not asked for again. */
function changeQuery(difference, keep = true) {
  if (!app.state) return;
  const typed = $('q').value.trim();
  const subject = isPictureQuery(app.query) && !typed ? {} : { text: typed, like: '', picture: '' };
  app.query = { ...app.query, ...subject, k: null, explained: '', ...difference };
  if (!isPictureQuery(app.query)) unsetServedSettings(app.query);
  writeAddress(keep);
  renderQuery();
  clearTimeout(app.soon);
  app.soon = setTimeout(runSearch, 80);
}

/** Settings that are as served anyway are not asked for: only such queries count for what is served. */
function unsetServedSettings(query) {
  const served = effectiveSettings({ ...query, ...UNSET_SETTINGS });
  for (const name of Object.keys(UNSET_SETTINGS)) if (query[name] === served[name]) query[name] = null;
}

/** Looks for what is like an image of the catalogue. */
function searchSimilar(hit) {
  $('q').value = '';
  if ($('explain').open) $('explain').close();
  changeQuery({ text: '', picture: '', like: hit.image_id });
  scrollTo({ top: 0, behavior: prefersReducedMotion() ? 'auto' : 'smooth' });
}

/* Controls */
/** What changes seldom: only where it has changed, so that nobody's choice is interrupted. */
function renderChoices() {
  const { substitutes, example_queries, normalisers, prompt_sets, candidate, configuration, attributes } = app.state;
  const choices = JSON.stringify([substitutes, example_queries, normalisers, prompt_sets, candidate?.name, configuration, attributes.map(({ name }) => name)]);
  if (renderChoices.last === choices) return;
  renderChoices.last = choices;
  $('substitutes').hidden = !substitutes.length;
  const substituteItem = ({ component, how_to_replace }) => el('li', {}, `${component}. For the real one, set `, el('code', {}, how_to_replace), '.');
  $('substitutes').querySelector('ul').replaceChildren(...substitutes.map(substituteItem));
  const chip = (text) => el('button', { type: 'button', class: 'chip', 'data-test': 'example', onclick: () => { $('q').value = text; changeQuery({}); } }, text);
  $('examples').replaceChildren(...example_queries.map(chip));
  $('examples').hidden = !example_queries.length;
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
    changeQuery({ configuration: '' });
  }
}
function renderSegments(name, choices) {
  const segment = ([value, words]) => el('label', {}, words, el('input', { type: 'radio', name, value, 'data-test': `${name}-${value || 'live'}` }));
  $(name).querySelector('.segments').replaceChildren(...choices.map(segment));
}

function renderQuery() {
  const { query } = app;
  const { normaliser, weight, set } = effectiveSettings(query);
  if (query.text || !$('q').matches(':focus')) $('q').value = query.text;
  [$('weight').value, $('set').value] = [weight, set];
  for (const choice of $('normaliser').querySelectorAll('input')) choice.checked = choice.value === normaliser;
  for (const choice of $('configuration').querySelectorAll('input')) choice.checked = choice.value === query.configuration;
  for (const choice of $('tabs').querySelectorAll('input')) choice.checked = choice.value === query.shown;
  $('columns').dataset.shown = query.shown;
  const words = { 0: '0 = plain CLIP', 1: '1 = the normaliser alone' };
  $('weight-words').textContent = words[weight] ?? `${weight.toFixed(2)} (${words[0]})`;
  $('how-short').textContent = `${normaliserName(normaliser)}, weight ${weight.toFixed(2)}, ${set}`;
  $('hint').textContent = isPictureQuery(query) && !hasOwnSettings(query) ? PLAIN_PICTURES_HINT : NORMALISERS[normaliser]?.[1] ?? '';
  $('reset').disabled = !hasOwnSettings(query) && !query.configuration;
  renderPictureQuery();
  renderFilters();
  document.title = query.text ? `${query.text} – bsap` : isPictureQuery(query) ? 'Like a picture – bsap' : 'bsap';
}
