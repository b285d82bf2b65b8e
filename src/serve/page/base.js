'use strict';
/* What everything else uses: nodes, words, requests, the page's memory. */

const app = {
  state: null, answer: null, // the last answers of /v1/state and /v1/search, this one with what was `asked`
  session: null, // the last answer of /v1/session
  query: null, // what is asked, see query.js
  soon: 0, running: null, // the timer before a search, and the AbortController of the one in progress
  explained: null, // the question of the open panel, then with its answer
  stale: false, refreshedAt: 0, // whether the catalogue has changed since the answer, and when that was asked for
  changedAt: '', // time of the newest known change
  paused: false, held: [], // changes that the feed does not show yet
  arrivals: [], delays: [], listeningSince: Date.now(), // times of changes, and seconds until they were searchable
  marks: new Map(), // what was said of results, by query and image
  retry: null, // { at, action, words } of an attempt to come
};

/* Nodes */
function buildNode(node, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith('on')) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) node.setAttribute(name, value === true ? '' : value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}
const el = (name, properties = {}, ...children) => buildNode(document.createElement(name), properties, children);
const svg = (name, properties, ...children) => buildNode(document.createElementNS('http://www.w3.org/2000/svg', name), properties, children);
const $ = (id) => document.getElementById(id);
const button = (text, test, onclick) => el('button', { type: 'button', class: 'quiet', 'data-test': test, onclick }, text);
const icon = (name) => svg('svg', { 'aria-hidden': true }, svg('use', { href: `#icon-${name}` }));
const iconButton = (name, words, test, onclick) =>
  el('button', { type: 'button', class: 'icon', title: words, 'aria-label': words, 'data-test': test, onclick }, icon(name));
const timeNode = (time) => el('time', { datetime: time, title: new Date(time).toLocaleString() }, formatAge(time));

function thumbnail(picture, ...over) {
  const box = el('span', { class: 'thumb' });
  const missing = () => box.classList.add('missing');
  if (picture) box.append(el('img', { src: picture, alt: '', loading: 'lazy', decoding: 'async', onerror: missing }));
  else missing();
  box.append(...over);
  return box;
}

/* Words and numbers */
const formatScore = (value) => value.toFixed(3).replace('-', '−');
const formatCount = (value) => value.toLocaleString('en-GB');
const clamp = (value, low, high) => Math.min(high, Math.max(low, value));
const titleOf = (hit) => hit.attributes?.title ?? hit.image_id;
function formatDuration(seconds) {
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  const [size, unit] = [[86400, 'd'], [3600, 'h'], [60, 'min'], [1, 's']].find(([size]) => seconds >= size);
  return `${Math.floor(seconds / size)} ${unit}`;
}
function formatAge(time) {
  const seconds = Math.max(0, (Date.now() - Date.parse(time)) / 1000);
  return seconds < 2 ? 'now' : `${formatDuration(Math.floor(seconds)).replace('.0', '')} ago`;
}

/** Says something for a moment, to screen readers too. */
function toast(words) {
  $('toast').textContent = words;
  $('toast').hidden = false;
  clearTimeout(toast.timer);
  toast.timer = setTimeout(() => { $('toast').hidden = true; }, 4000);
}

/** Works on pages without TLS too, where browsers lend no `navigator.clipboard`. */
function copyText(text) {
  const put = (event) => { event.preventDefault(); event.clipboardData.setData('text/plain', text); };
  document.addEventListener('copy', put, { once: true });
  const copied = document.execCommand('copy');
  document.removeEventListener('copy', put);
  return copied;
}

/** Words that a click explains, by keyboard and touch too. */
const hintButton = (words, why, test) =>
  el('button', { type: 'button', class: 'explained', popovertarget: 'why', 'data-test': test, onclick: () => { $('why').textContent = why; } }, words);

/* Requests */
async function request(path, body, signal) {
  const json = { method: 'POST', headers: { 'content-type': 'application/json' }, body: JSON.stringify(body), signal };
  const otherwise = (problem) => (error) => { throw error.name === 'AbortError' ? error : problem; };
  const unreachable = { title: 'No connection', detail: 'the server cannot be reached', retry_after: 3 };
  const response = await fetch(path, body && json).catch(otherwise(unreachable));
  const unreadable = { title: 'Error', detail: `the server answered ${response.status} ${response.statusText}` };
  const answer = response.status === 204 ? null : await response.json().catch(otherwise(unreadable));
  if (response.status === 401) askForKey();
  if (!response.ok) throw { ...unreadable, status: response.status, ...answer };
  return answer;
}
