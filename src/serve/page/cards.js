/* Hits as pictures, and how they moved. */

/** Class, text and words of how balancing moved a hit; `shown` places of the raw ranking are shown. */
function rankMovement({ rank, raw_rank }, shown = Infinity) {
  const places = Math.abs(raw_rank - rank);
  if (raw_rank > shown) return ['new', 'new', `new here: place ${raw_rank} by plain CLIP`];
  if (raw_rank > rank) return ['up', `▲${places}`, `up ${places} from place ${raw_rank} by plain CLIP`];
  if (raw_rank < rank) return ['down', `▼${places}`, `down ${places} from place ${raw_rank} by plain CLIP`];
  return ['same', '=', 'same place as by plain CLIP'];
}
const badgeNode = ([kind, text, words]) =>
  el('span', { class: `badge ${kind}`, 'data-test': 'badge', title: words, role: 'img', 'aria-label': words }, text);

/** How many hits moved, by kind. */
function movementBadges(hits, shown) {
  const kinds = hits.map((hit) => rankMovement(hit, shown)[0]);
  const tally = [['up', '▲', 'moved up'], ['down', '▼', 'moved down'], ['new', 'new', 'came in']];
  return tally.flatMap(([kind, sign, words]) => {
    const many = kinds.filter((one) => one === kind).length;
    return many ? [badgeNode([kind, `${many} ${sign}`, `${many} ${words}`])] : [];
  });
}

function cardNodes(hit, rank, score, badge) {
  const over = [el('span', { class: 'rank' }, String(rank)), ...(badge ? [badgeNode(badge)] : [])];
  const title = el('span', { class: 'title', title: titleOf(hit) }, titleOf(hit));
  const properties = { type: 'button', class: `card ${badge?.[0] ?? ''}`, 'data-test': 'card', 'data-picture': hit.picture, onclick: () => openExplanation(hit.image_id) };
  const like = iconButton('like', `More like ${titleOf(hit)}`, 'more-like', () => searchSimilar(hit));
  const foot = el('span', { class: 'foot' }, el('span', { class: 'score' }, formatScore(score)), wrongImageButton(hit), like);
  return [el('button', properties, thumbnail(hit.picture, ...over), title), foot];
}

/** Fills a column with hits; images that were there keep their places in the document and glide. */
function renderColumn(column, hits, draw) {
  const list = column.querySelector('.cards');
  const still = prefersReducedMotion() || list.closest('[hidden]');
  const old = new Map([...list.children].map((item) => [item.dataset.imageId, { item, from: still ? null : item.getBoundingClientRect() }]));
  const focused = list.contains(document.activeElement) && document.activeElement;
  const items = hits.map((hit) => old.get(hit.image_id)?.item ?? el('li', { 'data-image-id': hit.image_id }));
  items.forEach((item, index) => updateItem(item, draw(hits[index])));
  if (items.length !== list.childElementCount || items.some((item, index) => item !== list.children[index])) list.replaceChildren(...items);
  if (focused && document.activeElement !== focused) focused.focus({ preventScroll: true });
  if (!still) items.forEach((item) => animateMove(item, old.get(item.dataset.imageId)?.from));
}

/** Puts a card into an item; what stays the same is kept, so that nothing flickers and no click is lost. */
function updateItem(item, next) {
  const [before, after] = [item.querySelector('.thumb'), next[0].querySelector('.thumb')];
  const samePicture = before && item.firstChild.dataset.picture === next[0].dataset.picture;
  if (samePicture) after.className = before.className;
  if (item.childElementCount && next.every((node, index) => item.children[index].isEqualNode(node))) return;
  const focused = item.contains(document.activeElement) && document.activeElement.dataset.test;
  if (samePicture) after.querySelector('img')?.replaceWith(before.querySelector('img'));
  item.replaceChildren(...next);
  if (focused) item.querySelector(`[data-test=${focused}]`)?.focus({ preventScroll: true });
}

const prefersReducedMotion = () => matchMedia('(prefers-reduced-motion: reduce)').matches;
function animateMove(item, from) {
  item.getAnimations().forEach((animation) => animation.cancel());
  const to = item.getBoundingClientRect();
  if (from && from.left === to.left && from.top === to.top) return;
  const appear = { opacity: [0, 1], transform: ['scale(.94)', 'none'] };
  const steps = from ? { transform: [`translate(${from.left - to.left}px, ${from.top - to.top}px)`, 'none'] } : appear;
  item.animate(steps, { duration: 380, easing: 'cubic-bezier(.2, .7, .2, 1)' });
}

/** Marks the image under the pointer or the focus in both columns. */
function highlightTwins(event) {
  const id = event.target.closest('.cards li')?.dataset.imageId;
  const over = ['pointerover', 'focusin'].includes(event.type);
  for (const item of document.querySelectorAll('.cards li')) item.classList.toggle('twin', over && item.dataset.imageId === id);
}

/** Arrow keys go from card to card, up and down by rows. */
function moveFocusByArrowKey(event) {
  const item = event.target.closest('.cards li');
  if (!item || event.altKey || event.ctrlKey || event.metaKey) return;
  const items = [...item.parentNode.children];
  const wide = items.filter((one) => one.offsetTop === items[0].offsetTop).length;
  const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -wide, ArrowDown: wide }[event.key];
  const next = items[items.indexOf(item) + step];
  if (!step || !next) return;
  event.preventDefault();
  next.querySelector('.card').focus();
}
