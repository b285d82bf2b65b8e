/* Cards of hits, and how balancing changed their ranks. */

/** Class, text and label of the badge for how balancing changed a hit's rank. `shown`: number of plain CLIP results on the page. */
function rankMovement({ rank, raw_rank }, shown = Infinity) {
  const difference = Math.abs(raw_rank - rank);
  if (raw_rank > shown) return ['new', 'new', `new here: rank ${raw_rank} by plain CLIP`];
  if (raw_rank > rank) return ['up', `▲${difference}`, `up ${difference} from rank ${raw_rank} by plain CLIP`];
  if (raw_rank < rank) return ['down', `▼${difference}`, `down ${difference} from rank ${raw_rank} by plain CLIP`];
  return ['same', '=', 'same rank as by plain CLIP'];
}
const badgeNode = ([kind, text, label]) =>
  el('span', { class: `badge ${kind}`, 'data-test': 'badge', title: label, role: 'img', 'aria-label': label }, text);

/** One badge per kind of movement, with the number of hits. */
function movementBadges(hits, shown) {
  const kinds = hits.map((hit) => rankMovement(hit, shown)[0]);
  const badges = [['up', '▲', 'moved up'], ['down', '▼', 'moved down'], ['new', 'new', 'new here']];
  return badges.flatMap(([kind, sign, label]) => {
    const count = kinds.filter((one) => one === kind).length;
    return count ? [badgeNode([kind, `${count} ${sign}`, `${count} ${label}`])] : [];
  });
}

function cardNodes(hit, rank, score, badge) {
  const overlays = [el('span', { class: 'rank' }, String(rank)), ...(badge ? [badgeNode(badge)] : []), ...(hit.right === undefined ? [] : [markNode(hit.right)])];
  const title = el('span', { class: 'title', title: titleOf(hit) }, titleOf(hit));
  const properties = { type: 'button', class: `card ${badge?.[0] ?? ''}`, 'data-test': 'card', 'data-picture': hit.picture, onclick: () => openExplanation(hit.image_id) };
  const like = iconButton('like', `More like ${titleOf(hit)}`, 'more-like', () => searchSimilar(hit));
  const foot = el('span', { class: 'foot' }, el('span', { class: 'score' }, formatScore(score)), wrongImageButton(hit), like);
  return [el('button', properties, thumbnail(hit.picture, ...overlays), title), foot];
}

/** Renders hits in a column; the nodes of images that it showed before are reused and animated to their new places. */
function renderColumn(column, hits, renderCard) {
  const list = column.querySelector('.cards');
  const skipAnimation = prefersReducedMotion() || list.closest('[hidden]');
  const old = new Map([...list.children].map((item) => [item.dataset.imageId, { item, from: skipAnimation ? null : item.getBoundingClientRect() }]));
  const focused = list.contains(document.activeElement) && document.activeElement;
  const items = hits.map((hit) => old.get(hit.image_id)?.item ?? el('li', { 'data-image-id': hit.image_id }));
  items.forEach((item, index) => updateItem(item, renderCard(hits[index])));
  if (items.length !== list.childElementCount || items.some((item, index) => item !== list.children[index])) list.replaceChildren(...items);
  if (focused && document.activeElement !== focused) focused.focus({ preventScroll: true });
  if (!skipAnimation) items.forEach((item) => animateMove(item, old.get(item.dataset.imageId)?.from));
}

/** Replaces the card in an item only if it has changed, and reuses the picture: otherwise pictures flicker and clicks are lost. */
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

/** Highlights the image under the pointer or with the focus in both columns. */
function highlightSameImage(event) {
  const id = event.target.closest('.cards li')?.dataset.imageId;
  const isEntered = ['pointerover', 'focusin'].includes(event.type);
  for (const item of document.querySelectorAll('.cards li')) item.classList.toggle('same-image', isEntered && item.dataset.imageId === id);
}

/** Moves the focus between cards by arrow keys, up and down by rows. */
function moveFocusByArrowKey(event) {
  const item = event.target.closest('.cards li');
  if (!item || event.altKey || event.ctrlKey || event.metaKey) return;
  const items = [...item.parentNode.children];
  const columnCount = items.filter((one) => one.offsetTop === items[0].offsetTop).length;
  const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columnCount, ArrowDown: columnCount }[event.key];
  const next = items[items.indexOf(item) + step];
  if (!step || !next) return;
  event.preventDefault();
  next.querySelector('.card').focus();
}
