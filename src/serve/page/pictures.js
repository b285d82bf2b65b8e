/* Pictures as queries: of the catalogue, chosen, pasted or dropped. */

/** Longest side of a picture that is sent, in pixels: more than the models look at, and small enough
 *  for a link. */
const MAX_SENT_SIDE_PX = 384;
/** Files of at most this many bytes are sent as they are. */
const MAX_UNSCALED_BYTES = 24 << 10;

/** What is looked for, where it is no text. */
async function renderPictureQuery() {
  const { like, picture } = app.query;
  const shown = like || picture;
  $('subject').hidden = !shown;
  $('q').placeholder = shown ? 'Or describe a picture' : 'Describe a picture';
  if ($('subject').dataset.shown === shown) return;
  $('subject').dataset.shown = shown;
  if (!shown) return $('subject').replaceChildren();
  const source = like ? `/v1/images/${encodeURIComponent(like)}/picture` : `data:image/jpeg;base64,${picture}`;
  const known = like && findHit(like);
  const words = el('span', {}, like ? `Like ${titleOf(known ?? { image_id: like })}` : 'Like your picture');
  const clear = iconButton('close', 'Do not search by this picture', 'clear-subject', () => { changeQuery({ like: '', picture: '' }); $('q').focus(); });
  $('subject').replaceChildren(thumbnail(source), words, clear);
  if (!like || known) return;
  const image = await request(`/v1/images/${encodeURIComponent(like)}`).catch(() => null); // the search tells what is wrong
  if (image && words.isConnected) words.textContent = `Like ${titleOf(image)}`;
}
const findHit = (id) => [...(app.answer?.hits ?? []), ...(app.answer?.raw_hits ?? [])].find((hit) => hit.image_id === id);

/** Searches by a file, made small where it is large. */
async function searchByFile(file) {
  if (!file) return;
  try {
    const picture = await toBase64(file.size <= MAX_UNSCALED_BYTES ? await requireReadable(file) : await shrinkPicture(file));
    $('q').value = '';
    changeQuery({ text: '', like: '', picture });
  } catch {
    toast(`${file.name || 'This'} is no picture that the browser can read`);
  }
}
async function requireReadable(file) {
  (await createImageBitmap(file)).close();
  return file;
}
async function shrinkPicture(file) {
  const bitmap = await createImageBitmap(file);
  const scale = Math.min(1, MAX_SENT_SIDE_PX / Math.max(bitmap.width, bitmap.height));
  const canvas = el('canvas', { width: Math.max(1, Math.round(bitmap.width * scale)), height: Math.max(1, Math.round(bitmap.height * scale)) });
  const context = canvas.getContext('2d');
  context.fillStyle = '#fff'; // JPEG knows no transparency
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.imageSmoothingQuality = 'high';
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  return new Promise((resolve, reject) => { canvas.toBlob((blob) => (blob ? resolve(blob) : reject(new Error('no blob'))), 'image/jpeg', 0.9); });
}
async function toBase64(blob) {
  const bytes = new Uint8Array(await blob.arrayBuffer());
  let text = '';
  for (let at = 0; at < bytes.length; at += 4096) text += String.fromCharCode(...bytes.subarray(at, at + 4096));
  return btoa(text);
}

/** Files are taken wherever on the page they are dropped or pasted. */
function bindPictureInput() {
  const carries = ({ dataTransfer }) => [...(dataTransfer?.types ?? [])].includes('Files');
  const pictureIn = ({ files }) => [...files].find(({ type }) => type.startsWith('image/')) ?? files[0];
  document.addEventListener('dragover', (event) => {
    if (!carries(event)) return;
    event.preventDefault();
    $('drop').hidden = false;
  });
  document.addEventListener('dragleave', (event) => { if (!event.relatedTarget) $('drop').hidden = true; });
  document.addEventListener('drop', (event) => {
    $('drop').hidden = true;
    if (!carries(event)) return;
    event.preventDefault();
    searchByFile(pictureIn(event.dataTransfer));
  });
  document.addEventListener('paste', ({ clipboardData }) => { if (clipboardData?.files.length) searchByFile(pictureIn(clipboardData)); });
  $('pick').addEventListener('click', () => $('file').click());
  $('file').addEventListener('change', () => { searchByFile($('file').files[0]); $('file').value = ''; });
}
