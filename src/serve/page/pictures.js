/* Searches by a picture: of the catalogue, or chosen, pasted or dropped by the user. */

/** Maximum length of the longer side of a picture that is sent, in pixels: above the input size of the
 *  models, and small enough for a link. */
const MAX_SENT_SIDE_PX = 384;
/** Files of at most this many bytes are sent without scaling. */
const MAX_UNSCALED_BYTES = 24 << 10;

/** Shows the picture that is searched by, if there is one. */
async function renderPictureQuery() {
  const { similarTo, picture } = app.query;
  const shown = similarTo || picture;
  $('query-picture').hidden = !shown;
  $('q').placeholder = shown ? 'Or describe a picture' : 'Describe a picture';
  if ($('query-picture').dataset.shown === shown) return;
  $('query-picture').dataset.shown = shown;
  if (!shown) return $('query-picture').replaceChildren();
  const source = similarTo ? pictureAddress(similarTo) : `data:image/jpeg;base64,${picture}`;
  const hit = similarTo && findHit(similarTo);
  const label = el('span', {}, similarTo ? `Similar to ${titleOf(hit ?? { image_id: similarTo })}` : 'Similar to your picture');
  const clear = iconButton('close', 'Do not search by this picture', 'clear-query-picture', () => { changeQuery({ similarTo: '', picture: '' }); $('q').focus(); });
  $('query-picture').replaceChildren(thumbnail(source), label, clear);
  if (!similarTo || hit) return;
  const image = await request(`v1/images?id=${encodeURIComponent(similarTo)}`).catch(() => null); // the search reports the error
  if (image && label.isConnected) label.textContent = `Similar to ${titleOf(image)}`;
}
const findHit = (id) => [...(app.answer?.hits ?? []), ...(app.answer?.raw_hits ?? [])].find((hit) => hit.image_id === id);

/** Searches by a file; scales large pictures down. */
async function searchByFile(file) {
  if (!file) return;
  try {
    const picture = await toBase64(file.size <= MAX_UNSCALED_BYTES ? await requireReadable(file) : await shrinkPicture(file));
    $('q').value = '';
    changeQuery({ text: '', similarTo: '', picture });
  } catch {
    toast(`${file.name || 'This'} is not a picture that the browser can read`);
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
  context.fillStyle = '#fff'; // JPEG has no transparency
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

/** Accepts files that are dropped or pasted anywhere on the page. */
function bindPictureInput() {
  const hasFiles = ({ dataTransfer }) => [...(dataTransfer?.types ?? [])].includes('Files');
  const pictureIn = ({ files }) => [...files].find(({ type }) => type.startsWith('image/')) ?? files[0];
  document.addEventListener('dragover', (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    $('drop').hidden = false;
  });
  document.addEventListener('dragleave', (event) => { if (!event.relatedTarget) $('drop').hidden = true; });
  document.addEventListener('drop', (event) => {
    $('drop').hidden = true;
    if (!hasFiles(event)) return;
    event.preventDefault();
    searchByFile(pictureIn(event.dataTransfer));
  });
  document.addEventListener('paste', ({ clipboardData }) => { if (clipboardData?.files.length) searchByFile(pictureIn(clipboardData)); });
  $('pick').addEventListener('click', () => $('file').click());
  $('file').addEventListener('change', () => { searchByFile($('file').files[0]); $('file').value = ''; });
}
