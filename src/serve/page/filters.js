/* Filters by the attributes that the server declares. */

/** Times that can be filtered in every catalogue. */
const TIME_ATTRIBUTES = [{ name: 'embedded_at', type: 'time', values: null }, { name: 'event_time', type: 'time', values: null }];
const NUMBER_TYPES = ['integer', 'number'];
const filterableAttributes = () => [...app.state.attributes, ...TIME_ATTRIBUTES];

/* A filter is `{ in: [text, …] }`, or has some of `from`, `to`, `prefix` and `item`. */
function buildFilter(filters) {
  const conditions = [];
  for (const { name, type } of filterableAttributes()) {
    const { in: values, from, to, prefix, item } = filters[name] ?? {};
    const typed = (text) => (type === 'boolean' ? text === 'true' : NUMBER_TYPES.includes(type) ? Number(text) : text);
    if (values) conditions.push({ in: { [name]: values.map(typed) } });
    if (from) conditions.push({ gte: { [name]: typed(from) } });
    if (to) conditions.push({ lte: { [name]: typed(to) } });
    if (prefix) conditions.push({ prefix: { [name]: prefix } });
    if (item) conditions.push({ has_item: { [name]: item } });
  }
  return conditions.length > 1 ? { and: conditions } : conditions[0] ?? null;
}

/** In the URL: `f.colour=red&f.colour=blue&f.count.from=2&f.title.prefix=two`. */
function filtersToParameters(filters) {
  return Object.entries(filters).flatMap(([name, { in: values = [], ...rest }]) => [
    ...values.map((value) => [`f.${name}`, value]),
    ...Object.entries(rest).map(([bound, value]) => [`f.${name}.${bound}`, value]),
  ]);
}
function filtersFromParameters(parameters) {
  const filters = {};
  for (const { name } of filterableAttributes()) {
    const filter = {};
    const values = parameters.getAll(`f.${name}`);
    if (values.length) filter.in = values;
    for (const bound of ['from', 'to', 'prefix', 'item']) if (parameters.get(`f.${name}.${bound}`)) filter[bound] = parameters.get(`f.${name}.${bound}`);
    if (Object.keys(filter).length) filters[name] = filter;
  }
  return filters;
}

function setFilter(name, difference) {
  const filter = { ...app.query.filters[name], ...difference };
  for (const key of Object.keys(filter)) if (!filter[key]?.length) delete filter[key];
  const { [name]: _, ...others } = app.query.filters;
  changeQuery({ filters: Object.keys(filter).length ? { ...others, [name]: filter } : others });
}

/* One drawer per attribute; its choices are rendered when it is opened. */
function renderFilterChoices() {
  const drawer = ({ name, type }) => {
    const summary = el('summary', { class: 'chip' }, name.replaceAll('_', ' '));
    const body = el('div', { class: 'panel drawer', role: 'group', 'aria-label': `Filter by ${name}` });
    const ontoggle = (event) => { if (event.target.open) openDrawer(event.target, name, body); };
    return el('details', { class: 'filter', name: 'filter', 'data-name': name, 'data-type': type, 'data-test': `filter-${name}`, ontoggle }, summary, body);
  };
  const clear = el('button', { type: 'button', class: 'chip', id: 'clear-filters', 'data-test': 'clear-filters', onclick: () => changeQuery({ filters: {} }) }, 'Clear filters');
  $('filters').replaceChildren(...filterableAttributes().map(drawer), clear);
}
function openDrawer(drawer, name, body) {
  const attribute = filterableAttributes().find((one) => one.name === name);
  const filter = app.query.filters[name] ?? {};
  body.replaceChildren(...(attribute.values ? valueChoices(attribute, filter) : attribute.type === 'text' ? textChoices(name, filter) : rangeChoices(attribute, filter)));
  body.style.translate = '';
  const beyond = body.getBoundingClientRect().right - document.documentElement.clientWidth + 12;
  if (beyond > 0 && getComputedStyle(body).position === 'absolute') body.style.translate = `${-beyond}px`;
}

function valueChoices({ name, values }, filter) {
  const chosen = new Set(filter.in);
  const vanished = [...chosen].filter((value) => !values.some((one) => one.value === value)).map((value) => ({ value, images: 0 }));
  return [...values, ...vanished].map(({ value, images }) => {
    const onchange = (event) => {
      chosen[event.target.checked ? 'add' : 'delete'](value);
      setFilter(name, { in: [...chosen] });
    };
    const box = el('input', { type: 'checkbox', value, checked: chosen.has(value), onchange, 'data-test': 'filter-value' });
    return el('label', {}, box, el('span', {}, value), el('span', { class: 'muted number' }, formatCount(images)));
  });
}
function textChoices(name, filter) {
  const choice = (which, label) => {
    const onchange = (event) => setFilter(name, { [which]: event.target.value });
    return el('label', { class: 'bound' }, label, el('input', { type: 'text', value: filter[which] ?? '', onchange, 'data-test': `filter-${which}` }));
  };
  return [choice('prefix', 'begins with'), choice('item', 'has, among items separated by semicolons')];
}
function rangeChoices({ name, type }, filter) {
  const time = type === 'time';
  const bound = (which, label) => {
    const onchange = ({ target: { value } }) => setFilter(name, { [which]: time && value ? new Date(value).toISOString() : value });
    const value = time && filter[which] ? toLocalInputValue(filter[which]) : filter[which] ?? '';
    const kind = time ? { type: 'datetime-local' } : { type: 'number', step: type === 'integer' ? 1 : 'any' };
    return el('label', { class: 'bound' }, label, el('input', { ...kind, value, onchange, 'data-test': `filter-${which}` }));
  };
  return [bound('from', time ? 'not before' : 'at least'), bound('to', time ? 'not after' : 'at most')];
}
/** A time in the format of `datetime-local`: without a zone, in the user's. */
function toLocalInputValue(text) {
  const time = new Date(text);
  return Number.isNaN(time.getTime()) ? '' : new Date(time - time.getTimezoneOffset() * 60_000).toISOString().slice(0, 16);
}

function renderFilters() {
  for (const drawer of $('filters').querySelectorAll('details')) {
    const { name, type } = drawer.dataset;
    const filter = app.query.filters[name];
    drawer.classList.toggle('active', Boolean(filter));
    drawer.firstChild.textContent = name.replaceAll('_', ' ') + (filter ? `: ${describeFilter(filter, type)}` : '');
  }
  $('clear-filters').hidden = !Object.keys(app.query.filters).length;
}
function describeFilter({ in: values = [], from, to, prefix, item }, type) {
  const format = (value) => (type === 'time' ? new Date(value).toLocaleString('en-GB', { dateStyle: 'short', timeStyle: 'short' }) : value);
  const several = values.length > 2 ? `${values.slice(0, 2).join(', ')} +${values.length - 2}` : values.join(', ');
  const range = from && to ? `${format(from)} – ${format(to)}` : from ? `≥ ${format(from)}` : to ? `≤ ${format(to)}` : '';
  return [several, range, prefix && `${prefix}…`, item].filter(Boolean).join(', ');
}

/** Closes open drawers by Escape and by a click elsewhere. */
function closeDrawers(event) {
  for (const drawer of $('filters').querySelectorAll('details[open]')) {
    if (event.type === 'keydown' ? event.key !== 'Escape' : drawer.contains(event.target)) continue;
    drawer.open = false;
    if (event.type === 'keydown') drawer.firstChild.focus();
  }
}
