/* The query, its URL, and the controls that change it. */

const NORMALISERS = {
  raw: ['Raw', 'Raw: the score of plain CLIP, unchanged; the weight has no effect.'],
  softmax: ['Softmax', 'Softmax: the score minus a soft maximum of the image’s scores with the auxiliary prompts.'],
  zscore: ['Z-score', 'Z-score: how many standard deviations the score lies above the image’s own mean.'],
  range: ['Range', 'Range: where the score lies between the image’s own lowest and highest score.'],
  nnn: ['NNN', 'NNN: the score minus the mean of the image’s highest scores with the auxiliary prompts.'],
};
const PLAIN_PICTURES_HINT = 'Searches by a picture are ranked by plain CLIP unless you choose a normaliser: how an image scores with texts says little about how it scores with pictures.';
/** Settings that are null have the values of the configuration that answers. */
const UNSET_SETTINGS = { normaliser: null, weight: null, promptSet: null };
/** One of `text`, `similarTo` (an image's id) and `picture` (a file in base64) says what to search for. */
const EMPTY_QUERY = {
  text: '', similarTo: '', picture: '', ...UNSET_SETTINGS, configuration: '', filters: {}, k: null, ranking: 'balanced', explainedImage: '',
};
const normaliserName = (value) => NORMALISERS[value]?.[0] ?? value;
const isPictureQuery = (query) => Boolean(query.similarTo || query.picture);
const hasOverrides = ({ normaliser, weight, promptSet }) => [normaliser, weight, promptSet].some((value) => value !== null);

/** The settings that a query uses: those that are set, else those of its configuration. */
function effectiveSettings(query) {
  const { serving, candidate, prompt_sets } = app.state;
  const served = query.configuration && candidate?.name === query.configuration ? candidate.serving : serving;
  const promptSet = (prompt_sets.find(({ key }) => key === served.prompt_set) ?? prompt_sets[0])?.name ?? '';
  const defaults = isPictureQuery(query) && !hasOverrides(query)
    ? { normaliser: 'raw', weight: 0, promptSet }
    : { normaliser: served.normaliser, weight: Number(served.weight.toFixed(2)), promptSet };
  const chosen = Object.entries(query).filter(([name, value]) => name in UNSET_SETTINGS && value !== null);
  return { ...defaults, ...Object.fromEntries(chosen) };
}

/** The body of a search request; settings that are not set are omitted. */
function requestBody({ text, similarTo, picture, normaliser, weight, promptSet, configuration, filters }) {
  const filter = buildFilter(filters);
  return {
    ...(picture ? { image: picture } : similarTo ? { image_id: similarTo } : { text }),
    ...(normaliser !== null && { normaliser }),
    ...(weight !== null && { weight }),
    ...(promptSet !== null && { prompt_set: promptSet }),
    ...(configuration && { configuration }),
    ...(filter && { filter }),
  };
}

/** What must be known of the query of an answer after the controls have changed. */
const snapshotQuery = (query) => ({ text: query.text, overrides: hasOverrides(query), body: requestBody(query) });

/* The URL holds the whole query. A picture is in the fragment, which browsers do not send to servers. */
function readAddress() {
  const parameters = new URLSearchParams(location.search);
  const oneOf = (name, list) => (list.includes(parameters.get(name)) ? parameters.get(name) : null);
  const [weight, k] = ['weight', 'k'].map((name) => Number.parseFloat(parameters.get(name)));
  const similarTo = parameters.get('like') ?? '';
  const picture = similarTo ? '' : new URLSearchParams(location.hash.slice(1)).get('picture') ?? '';
  app.query = {
    ...EMPTY_QUERY,
    text: similarTo || picture ? '' : (parameters.get('q') ?? '').trim(),
    similarTo,
    picture: picture.replaceAll('-', '+').replaceAll('_', '/').padEnd(Math.ceil(picture.length / 4) * 4, '='),
    normaliser: oneOf('normaliser', app.state.normalisers),
    weight: Number.isFinite(weight) ? clamp(weight, 0, 1) : null,
    promptSet: oneOf('set', app.state.prompt_sets.map(({ name }) => name)),
    configuration: oneOf('configuration', [app.state.candidate?.name]) ?? '',
    filters: filtersFromParameters(parameters),
    k: Number.isFinite(k) ? clamp(Math.round(k), 1, MAX_RESULTS) : null,
    ranking: parameters.get('shown') === 'raw' ? 'raw' : 'balanced',
    explainedImage: parameters.get('image') ?? '',
  };
  renderQuery();
}

function buildAddress({ text, similarTo, picture, normaliser, weight, promptSet, configuration, filters, k, ranking, explainedImage }) {
  const parameters = new URLSearchParams();
  const put = (name, value) => { if (value !== null && value !== '') parameters.set(name, value); };
  put('q', text);
  put('like', similarTo);
  put('configuration', configuration);
  Object.entries({ normaliser, weight, set: promptSet }).forEach(([name, value]) => put(name, value));
  for (const [name, value] of filtersToParameters(filters)) parameters.append(name, value);
  put('k', k);
  put('shown', ranking === 'raw' ? ranking : '');
  put('image', explainedImage);
  const fragment = picture ? `#picture=${picture.replaceAll('+', '-').replaceAll('/', '_').replaceAll('=', '')}` : '';
  return `${location.pathname}?${parameters}${fragment}`;
}

/** Updates the URL. `push`: as a new entry of the history, so that the back button returns to the earlier query. */
function writeAddress(push) {
  const address = buildAddress(app.query);
  if (address === location.pathname + location.search + location.hash) return;
  history[push ? 'pushState' : 'replaceState'](null, '', address);
}

/** Changes the query and starts a search for the first page of its results. */
function changeQuery(difference, push = true) {
  if (!app.query) { // the page is still loading: startPage repeats it
    app.hasEarlyChange = true;
    return;
  }
  const typed = $('q').value.trim();
  const input = isPictureQuery(app.query) && !typed ? {} : { text: typed, similarTo: '', picture: '' };
  app.query = { ...app.query, ...input, k: null, explainedImage: '', ...difference };
  if (!isPictureQuery(app.query)) unsetServedSettings(app.query);
  writeAddress(push);
  renderQuery();
  clearTimeout(app.searchTimer);
  app.searchTimer = setTimeout(runSearch, 80);
}

/** Unsets settings that equal those of the configuration: the server counts only queries without settings of their own for a configuration. */
function unsetServedSettings(query) {
  const served = effectiveSettings({ ...query, ...UNSET_SETTINGS });
  for (const name of Object.keys(UNSET_SETTINGS)) if (query[name] === served[name]) query[name] = null;
}

/** Searches for images that are similar to an image of the catalogue. */
function searchSimilar(hit) {
  $('q').value = '';
  if ($('explain').open) $('explain').close();
  changeQuery({ text: '', picture: '', similarTo: hit.image_id });
  scrollTo({ top: 0, behavior: prefersReducedMotion() ? 'auto' : 'smooth' });
}

/* Controls */
/** Renders the choices of the controls, only if they have changed: an open control would lose its selection. */
function renderChoices() {
  const { substitutes, example_queries, normalisers, prompt_sets, candidate, configuration, attributes } = app.state;
  const choices = JSON.stringify([substitutes, example_queries, normalisers, prompt_sets, candidate?.name, configuration, attributes.map(({ name }) => name)]);
  if (renderChoices.last === choices) return;
  renderChoices.last = choices;
  $('substitutes').hidden = !substitutes.length;
  const substituteItem = ({ component, how_to_replace }) => el('li', {}, `${component}. To use the real one, set `, el('code', {}, how_to_replace), '.');
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
    toast(`${app.query.configuration} is no longer a candidate`);
    changeQuery({ configuration: '' });
  }
}
function renderSegments(name, choices) {
  const segment = ([value, label]) => el('label', {}, label, el('input', { type: 'radio', name, value, 'data-test': `${name}-${value || 'live'}` }));
  $(name).querySelector('.segments').replaceChildren(...choices.map(segment));
}

function renderQuery() {
  const { query } = app;
  const { normaliser, weight, promptSet } = effectiveSettings(query);
  if (query.text || !$('q').matches(':focus')) $('q').value = query.text;
  [$('weight').value, $('set').value] = [weight, promptSet];
  for (const choice of $('normaliser').querySelectorAll('input')) choice.checked = choice.value === normaliser;
  for (const choice of $('configuration').querySelectorAll('input')) choice.checked = choice.value === query.configuration;
  for (const choice of $('tabs').querySelectorAll('input')) choice.checked = choice.value === query.ranking;
  $('columns').dataset.shown = query.ranking;
  const ends = { 0: '0 = plain CLIP', 1: '1 = the normaliser alone' };
  $('weight-text').textContent = ends[weight] ?? `${weight.toFixed(2)} (${ends[0]})`;
  $('settings-summary').textContent = `${normaliserName(normaliser)}, weight ${weight.toFixed(2)}, ${promptSet}`;
  $('hint').textContent = isPictureQuery(query) && !hasOverrides(query) ? PLAIN_PICTURES_HINT : NORMALISERS[normaliser]?.[1] ?? '';
  $('reset').disabled = !hasOverrides(query) && !query.configuration;
  renderPictureQuery();
  renderFilters();
  document.title = query.text ? `${query.text} – bsap` : isPictureQuery(query) ? 'Similar to a picture – bsap' : 'bsap';
}
