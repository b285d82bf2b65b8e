'use strict';
/* Shared by all other files: the page's state, DOM nodes, formats, requests. */

const app = {
  state: null, // the last response of /v1/state
  answer: null, // the results that are shown: the response of /v1/search, with its `query` (see snapshotQuery)
  session: null, // the last response of /v1/session
  score: null, // the last response of /v1/sample-score
  query: null, hasEarlyChange: false, // the query that the controls show (query.js), and whether it was changed before there was one
  searchTimer: 0, searchAbort: null, // the timer that starts a search, and the AbortController of the search in progress
  explanation: null, // the request body of the open explanation; after the response, { query, ...response }
  stale: false, refreshedAt: 0, // whether the catalogue has changed since `answer`, and when that was requested
  changedAt: '', // time of the newest known change
  paused: false, pendingChanges: [], // changes that the feed does not show yet
  recentChanges: [], lags: [], listeningSince: Date.now(), // counts of changes with their times, and seconds until changes were searchable
  verdicts: new Map(), // feedback that was sent, by query and image
  retry: null, // { at, action, countdown } of the next attempt
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
const iconButton = (name, label, test, onclick) =>
  el('button', { type: 'button', class: 'icon', title: label, 'aria-label': label, 'data-test': test, onclick }, icon(name));
const timeNode = (time) => el('time', { datetime: time, title: new Date(time).toLocaleString() }, formatAge(time));

/** The address of a small JPEG of a picture of the catalogue, for every format. */
const previewAddress = (picture, side) => `${picture}&side=${side}`;

/** A preview of a picture, or a placeholder if there is none; `overlays` are drawn on it. Not of the catalogue: a `data:` address. */
function thumbnail(picture, ...overlays) {
  return pictureBox(picture, 256, overlays);
}
/** `side`: pixels of the preview on ordinary screens; dense ones get twice as many. */
function pictureBox(picture, side, overlays = []) {
  const box = el('span', { class: 'thumb' });
  const missing = () => box.classList.add('missing');
  const [src, dense] = !picture || picture.startsWith('data:') ? [picture, null] : [side, 2 * side].map((pixels) => previewAddress(picture, pixels));
  if (picture) box.append(el('img', { src, srcset: dense && `${src}, ${dense} 2x`, alt: '', loading: 'lazy', decoding: 'async', onerror: missing }));
  else missing();
  box.append(...overlays);
  return box;
}

/* Formats */
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

/** Shows a message for 4 s, and announces it to screen readers. */
function toast(text) {
  $('toast').textContent = text;
  $('toast').hidden = false;
  clearTimeout(toast.timer);
  toast.timer = setTimeout(() => { $('toast').hidden = true; }, 4000);
}

/** Copies without `navigator.clipboard`, which browsers do not provide to pages without TLS. */
function copyText(text) {
  const setData = (event) => { event.preventDefault(); event.clipboardData.setData('text/plain', text); };
  document.addEventListener('copy', setData, { once: true });
  const copied = document.execCommand('copy');
  document.removeEventListener('copy', setData);
  return copied;
}

/** A text with an explanation that a click opens; works by keyboard and touch too. */
const hintButton = (text, explanation, test) =>
  el('button', { type: 'button', class: 'explained', popovertarget: 'popover-text', 'data-test': test, onclick: () => { $('popover-text').textContent = explanation; } }, text);

/* Requests: all addresses are relative to the page's, which a proxy may serve under a path of its own. */
const pictureAddress = (id) => `v1/images/picture?id=${encodeURIComponent(id)}`;
/** Sends a POST request if there is a `body`, else GET. Returns the response's JSON; throws problem details. */
async function request(path, body, signal) {
  const post = { method: 'POST', headers: { 'content-type': 'application/json' }, body: JSON.stringify(body), signal };
  const throwProblem = (problem) => (error) => { throw error.name === 'AbortError' ? error : problem; };
  const unreachable = { title: 'No connection', detail: 'the server cannot be reached', retry_after: 3 };
  const response = await fetch(path, body && post).catch(throwProblem(unreachable));
  const unreadable = { title: 'Error', detail: `the server answered ${response.status} ${response.statusText}` };
  const json = response.status === 204 ? null : await response.json().catch(throwProblem(unreadable));
  if (response.status === 401) askForKey();
  if (!response.ok) throw { ...unreadable, status: response.status, ...json };
  return json;
}
