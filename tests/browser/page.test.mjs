// The page of a running demo (BSAP_URL, its folder BSAP_DEMO) in headless Chromium.
import assert from 'node:assert/strict';
import { execFileSync, spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { createServer } from 'node:net';
import { after, afterEach, before, test } from 'node:test';
import { chromium } from 'playwright-core';

const { BSAP_URL: url, BSAP_DEMO: demo, BSAP: program, SCREENSHOTS: shots } = process.env;
const one = (name) => `[data-test=${name}]`;
const balanced = `${one('column-balanced')} ${one('card')}`;
const faults = [];
let browser;

before(async () => {
  mkdirSync(shots, { recursive: true });
  browser = await chromium.launch({
    executablePath: process.env.CHROMIUM,
    args: ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking'],
  });
});
// Pages left open would go on following the catalogue.
afterEach(() => Promise.all(browser.contexts().map((context) => context.close())));
after(() => browser.close());

/** `expected`: the status of requests that this test lets fail. */
async function open(options = {}, path = '', expected = '404', at = url) {
  const context = await browser.newContext({ viewport: { width: 1280, height: 900 }, ...options });
  const page = await context.newPage();
  page.on('pageerror', (error) => faults.push(error.stack));
  // A picture may be deleted between the answer and its request: the live catalogue does that.
  page.on('console', (message) => {
    const known = ['404', expected].some((status) => message.text().includes(`status of ${status}`));
    if (message.type() === 'error' && !known) faults.push(message.text());
  });
  await page.goto(at + path);
  return page;
}

async function search(page, text) {
  await page.fill(one('search-box'), text);
  await page.click(one('search-button'));
  await page.waitForSelector(balanced);
  await page.waitForSelector('#results[aria-busy="false"]');
}

const cards = (page, column) => page.locator(`${one(column)} ${one('card')}`);
/** Waits until most of the first pictures are there: the live catalogue may have deleted one or two. */
const picturesLoaded = (page, images) =>
  page.waitForFunction((selector) => [...document.querySelectorAll(selector)].slice(0, 6).filter((image) => image.naturalWidth > 0).length >= 4, images);
const idOf = (card) => card.evaluate((node) => node.closest('li').dataset.imageId);
const has = (page, name, words) =>
  page.waitForFunction(([selector, source]) => new RegExp(source).test(document.querySelector(selector)?.innerText), [one(name), words.source]);
const json = async (path, body) => {
  const post = { method: 'POST', headers: { 'content-type': 'application/json' }, body: JSON.stringify(body) };
  return (await fetch(url + path, body && post)).json();
};

/** What makes `bsap` work on the demo's catalogue. */
const env = {
  ...process.env,
  ...Object.fromEntries(['TITLE', 'KIND', 'COLOUR', 'PATTERN'].map((name) => [`BSAP_ATTRIBUTES__${name}`, 'text'])),
  BSAP_ATTRIBUTES__COUNT: 'integer', BSAP_TABLE__URL: `${demo}/catalogue`,
  BSAP_MODEL__CHECKPOINT: `${demo}/demo-clip`, BSAP_LOG__FILE: `${demo}/other.log`,
};
const bsap = (...args) => execFileSync(program, args, { env, encoding: 'utf8', stdio: ['ignore', 'pipe', 'inherit'] });

/** A query worker on the same catalogue, with more lines in `[http]`: its address, and the process. */
async function queryWorker(name, lines) {
  const gate = createServer().listen(0, '127.0.0.1');
  await once(gate, 'listening');
  const { port } = gate.address();
  gate.close();
  const config = `[http]\nlisten = "127.0.0.1:${port}"\n${lines}\n[fetch]\nfile_roots = ["${demo}/pictures"]\n[metrics]\nenabled = false\n`;
  writeFileSync(`${demo}/${name}.toml`, config);
  const server = spawn(program, ['serve', '--config', `${demo}/${name}.toml`], { env, stdio: 'ignore' });
  const address = `http://127.0.0.1:${port}/`;
  for (let tries = 0; (await fetch(`${address}readyz`).catch(() => ({}))).status !== 200; tries += 1) {
    assert.ok(tries < 300, 'the query worker does not get ready');
    await new Promise((resolve) => { setTimeout(resolve, 200); });
  }
  return { address, server };
}
/** A query worker that asks for a key: its address, the key, and the process. */
async function keyed() {
  const printed = bsap('keys', 'new', '--name', 'shop', '--scope', 'search');
  const worker = await queryWorker('keyed', printed.slice(printed.indexOf('[[http.keys]]')));
  return { ...worker, key: printed.match(/^bsap_\S+/m)[0] };
}

/** An uncompressed TIFF of one colour. */
function tiff(width, height, rgb) {
  const size = 3 * width * height;
  // Tag, type, count, value; three values of two bytes lie behind the directory, and the pixels behind them.
  const fields = [[256, 4, 1, width], [257, 4, 1, height], [258, 3, 3, 122], [259, 3, 1, 1], [262, 3, 1, 2], [273, 4, 1, 128], [277, 3, 1, 3], [278, 4, 1, height], [279, 4, 1, size]];
  const head = Buffer.alloc(128);
  head.write('II*\0\x08', 'latin1');
  head.writeUInt16LE(fields.length, 8);
  for (const [index, [tag, type, count, value]] of fields.entries()) {
    const at = 10 + 12 * index;
    head.writeUInt16LE(tag, at);
    head.writeUInt16LE(type, at + 2);
    head.writeUInt32LE(count, at + 4);
    head.writeUInt32LE(value, at + 8);
  }
  for (const at of [122, 124, 126]) head.writeUInt16LE(8, at);
  return Buffer.concat([head, Buffer.alloc(size, Buffer.from(rgb))]);
}

/** Feedback that lies in a folder, oldest first. */
function stored(folder) {
  const files = readdirSync(folder, { recursive: true, withFileTypes: true }).filter((file) => file.isFile());
  const lines = files.flatMap((file) => readFileSync(`${file.parentPath}/${file.name}`, 'utf8').trim().split('\n'));
  return lines.map((line) => JSON.parse(line)).sort((a, b) => a.received_at.localeCompare(b.received_at));
}

test('the page says what it serves and what stands in for real parts', async () => {
  const page = await open();
  await page.waitForSelector(one('example'));
  const state = await json('v1/state');
  assert.equal(state.ready, true);
  assert.match(await page.locator('header').innerText(), new RegExp(state.model.name));
  assert.equal(await page.locator(one('notice')).isVisible(), state.model.notice !== null);
  assert.ok(await page.locator(one('substitutes')).isVisible());
});

test('the first screen shows the newest pictures, and the score of both rankings', async () => {
  const page = await open();
  // The catalogue changes, so the page is compared with the answers that it got itself.
  const scores = [];
  page.on('response', async (response) => {
    if (response.url().endsWith('v1/sample-score')) scores.push(await response.json());
  });
  await page.reload();
  await page.waitForSelector(`${one('newest-card')} >> nth=40`);
  await has(page, 'newest-status', /48 of 1\d\d images/);
  assert.ok(await page.locator(one('empty')).isHidden());
  const ids = () => page.locator(`${one('newest')} li`).evaluateAll((items) => items.map((item) => item.dataset.imageId));
  const newest = async () => (await json('v1/images/newest?limit=48')).images.map(({ image_id }) => image_id);
  const settled = async () => {
    for (let tries = 0; tries < 20; tries += 1) {
      if (JSON.stringify(await ids()) === JSON.stringify(await newest())) return true;
      await page.waitForTimeout(500);
    }
    return false;
  };
  assert.ok(await settled(), 'in the order of the server');
  const before = await ids();
  await page.waitForFunction(([selector, first]) => document.querySelector(selector).dataset.imageId !== first, [`${one('newest')} li`, before[0]], { timeout: 30_000 });
  await page.waitForSelector(one('score'));
  await has(page, 'score', /Plain CLIP\s+\d+ of \d+ \(\d+\.\d %\)/);
  await has(page, 'score', /Balanced \(NNN, weight 0.25\)/);
  await has(page, 'score', /Difference\s+[+−]?\d+\.\d points \([+−]?\d+\.\d to [+−]?\d+\.\d\)/);
  // No more is claimed than the intervals show.
  const shown = await page.innerText(one('score-summary'));
  const { known, score } = scores.findLast((answer) => answer.score.summary === shown);
  assert.ok(known && score.queries > 60, `${score.queries} queries`);
  const claims = /fewer false first hits|finds more/.test(shown);
  const isBetter = [score.false_first_hits, score.recall].some(({ verdict }) => verdict === 'better');
  assert.equal(claims, isBetter, shown);
  await page.screenshot({ path: `${shots}/first.png` });
  await page.click(`${one('newest-card')} >> nth=3`);
  await has(page, 'column-balanced', /Most similar/);
  assert.ok(await page.locator(one('newest')).isHidden());
  await page.goBack();
  await page.waitForSelector(`${one('newest-card')} >> nth=40`);
  assert.ok(await page.locator('#results').isHidden());
});

test('right and wrong results are marked where the right answers are known', async () => {
  const page = await open();
  await search(page, 'something striped');
  for (const column of ['column-raw', 'column-balanced']) {
    // At one time: the results follow the catalogue.
    const { marks, counts } = await page.locator(one(column)).evaluate((node) => ({
      marks: [...node.querySelectorAll('[data-test=card]')].map((card) => [
        card.querySelector('.title').innerText, card.querySelector('[data-test=mark]')?.getAttribute('aria-label'),
      ]),
      counts: node.querySelector('[data-test=right-count]').innerText,
    }));
    assert.ok(marks.length >= 10);
    for (const [title, mark] of marks) assert.equal(mark, /striped/.test(title) ? 'right' : 'wrong', title);
    const right = marks.filter(([, mark]) => mark === 'right').length;
    assert.match(counts, new RegExp(`^${right} of \\d+ right pictures among these ${marks.length}$`));
  }
  await page.screenshot({ path: `${shots}/marks.png` });
  await search(page, 'what nobody can judge');
  await page.waitForFunction(() => !document.querySelector('[data-test=mark]'));
  assert.equal(await page.locator(one('right-count')).first().innerText(), '');
});

test('an example shows raw and balanced results side by side', async () => {
  const page = await open();
  await page.click(`${one('example')} >> nth=2`);
  await page.waitForSelector(balanced);
  const [raw, other] = [await cards(page, 'column-raw').count(), await cards(page, 'column-balanced').count()];
  assert.equal(raw, other);
  assert.ok(raw >= 10);
  assert.match(page.url(), /q=/);
  assert.match(await page.locator(one('movement-summary')).innerText(), /▲|▼/);
  await picturesLoaded(page, `${one('column-raw')} ${one('card')} img`);
  await page.waitForSelector(`${one('feed-item')} >> nth=2`, { timeout: 20_000 });
  await page.screenshot({ path: `${shots}/results.png` });
});

test('weight 0 is plain CLIP in both columns', async () => {
  const page = await open();
  await search(page, 'a red mug');
  await page.locator(one('weight')).fill('0');
  await page.waitForFunction(() => {
    const ids = (column) => [...document.querySelectorAll(`[data-test=column-${column}] li`)].map((item) => item.dataset.imageId);
    const [raw, balanced] = [ids('raw'), ids('balanced')];
    return /weight=0/.test(location.search) && raw.length > 0 && raw.every((id, i) => id === balanced[i]);
  });
});

test('normaliser, weight and prompt set are switched, and back to what is served', async () => {
  const page = await open();
  await search(page, 'a yellow umbrella');
  await page.click(`label:has(${one('normaliser-zscore')})`);
  await has(page, 'column-balanced', /Z-score, weight 0.25/);
  await page.locator(one('weight')).fill('0.4');
  await page.selectOption(one('prompt-set'), 'photographs');
  await has(page, 'column-balanced', /Z-score, weight 0.40/);
  const sent = page.waitForRequest((request) => request.url().endsWith('/v1/search'));
  await page.click(one('reset'));
  // Only what is left as it is served counts as such.
  assert.deepEqual((await sent).postDataJSON(), { text: 'a yellow umbrella' });
  await has(page, 'column-balanced', /NNN, weight 0.25/);
});

test('filters offer what the catalogue has, and hold', async () => {
  const page = await open();
  await search(page, 'a yellow umbrella');
  await page.click(`${one('filter-kind')} summary`);
  await page.check(`${one('filter-kind')} input[value=umbrella]`);
  await page.check(`${one('filter-kind')} input[value=hat]`);
  await page.waitForTimeout(600);
  await page.screenshot({ path: `${shots}/filters.png` });
  await page.keyboard.press('Escape');
  assert.equal(await page.locator('.drawer:visible').count(), 0);
  await has(page, 'filter-kind', /umbrella, hat/);
  const { matched } = await json('v1/search', { text: 'a', k: 1, filter: { in: { kind: ['umbrella', 'hat'] } } });
  const shown = await page.waitForFunction((selector) => {
    const titles = [...document.querySelectorAll(selector)].map((card) => card.innerText);
    return titles.length > 0 && titles.every((title) => /umbrella|hat/.test(title)) && titles.length;
  }, balanced);
  assert.ok(Math.abs((await shown.jsonValue()) - Math.min(24, matched)) <= 2, 'as many as there are');
  await page.click(`${one('filter-count')} summary`);
  await page.fill(`${one('filter-count')} ${one('filter-from')}`, '2');
  await page.keyboard.press('Enter');
  await has(page, 'filter-count', /≥ 2/);
  await page.waitForURL(/f\.kind=umbrella&f\.kind=hat&f\.count\.from=2/);
  await page.click(`${one('filter-title')} summary`);
  await page.fill(`${one('filter-title')} ${one('filter-prefix')}`, 'nothing begins so');
  await page.keyboard.press('Enter');
  await has(page, 'empty', /No image passes the filter/);
  await page.click(one('clear-filters'));
  const [{ attributes: { title } }] = (await json('v1/search', { text: 'a yellow umbrella', k: 1 })).hits;
  await page.click(`${one('filter-title')} summary`);
  await page.fill(`${one('filter-title')} ${one('filter-item')}`, title);
  await page.keyboard.press('Enter');
  await page.waitForURL(/f\.title\.item=/);
  await page.waitForFunction(([selector, wanted]) => {
    const cards = [...document.querySelectorAll(selector)];
    return cards.length > 0 && cards.every((card) => card.innerText.includes(wanted));
  }, [balanced, title]);
  await page.click(one('clear-filters'));
  await page.waitForSelector(`${balanced} >> nth=20`);
});

test('cards load previews, and the original is loaded on request', async () => {
  for (const [deviceScaleFactor, side] of [[1, 256], [2, 512]]) {
    const page = await open({ deviceScaleFactor });
    const loaded = [];
    page.on('response', (response) => { if (response.url().includes('/picture')) loaded.push(response); });
    await search(page, 'a yellow umbrella');
    await picturesLoaded(page, `${balanced} img`);
    assert.ok(loaded.length > 0);
    for (const response of loaded) {
      assert.equal(new URL(response.url()).searchParams.get('side'), `${side}`);
      if (response.ok()) assert.equal(response.headers()['content-type'], 'image/jpeg');
    }
    await cards(page, 'column-balanced').first().click();
    await page.waitForSelector(one('histogram'));
    assert.ok(loaded.every((response) => response.url().includes('side=')));
    const original = await page.getAttribute(one('original'), 'href');
    assert.doesNotMatch(original, /side=/);
    assert.equal(await page.evaluate(async (path) => (await fetch(path)).headers.get('content-type'), original), 'image/jpeg');
  }
});

test('pictures that browsers cannot show are shown', async () => {
  const text = 'a red mug';
  const { hits } = await json('v1/search', { text, k: 24 });
  const files = hits.map(({ uri }) => new URL(uri)).filter((file) => existsSync(file));
  const originals = files.map((file) => readFileSync(file));
  const colour = [20, 140, 90];
  for (const file of files) writeFileSync(file, tiff(300, 200, colour));
  // Another process, because the demo has previews of the originals.
  const { address, server } = await queryWorker('tiff', '');
  try {
    const page = await open({}, `?q=${encodeURIComponent(text)}`, '404', address);
    const selector = `${balanced} img`;
    await page.waitForSelector(`${balanced} >> nth=5`);
    await picturesLoaded(page, selector);
    const shown = await page.evaluate((images) => [...document.querySelectorAll(images)].slice(0, 6).filter((image) => image.naturalWidth > 0).map((image) => {
      const context = Object.assign(document.createElement('canvas'), { width: 1, height: 1 }).getContext('2d');
      context.drawImage(image, 0, 0, 1, 1);
      return { width: image.naturalWidth, colour: [...context.getImageData(0, 0, 1, 1).data.slice(0, 3)] };
    }), selector);
    const isTiff = shown.filter((image) => image.width === 256 && image.colour.every((value, index) => Math.abs(value - colour[index]) < 6));
    assert.ok(isTiff.length >= 4, JSON.stringify(shown));
    const originalTypes = await Promise.all(hits.slice(0, 6).map(async ({ picture }) => (await fetch(address + picture)).headers.get('content-type')));
    assert.ok(originalTypes.filter((type) => type === 'image/tiff').length >= 4, originalTypes.join());
    await page.screenshot({ path: `${shots}/tiff.png` });
  } finally {
    await Promise.all(browser.contexts().map((context) => context.close())); // before their server ends
    files.forEach((file, index) => writeFileSync(file, originals[index]));
    server.kill('SIGTERM');
    await once(server, 'exit');
  }
});

test('a card explains why it ranks where it does', async () => {
  const page = await open();
  await search(page, 'a yellow umbrella');
  await cards(page, 'column-balanced').nth(1).click();
  const panel = page.locator(one('explain'));
  await page.waitForSelector(one('histogram'));
  const text = await panel.innerText();
  assert.match(text, /The raw score of this image for the query/);
  assert.match(text, /score = α · raw \+ β/);
  await page.screenshot({ path: `${shots}/explain.png` });
  const again = await open({}, new URL(page.url()).search);
  await again.waitForSelector(one('histogram'));
  await page.keyboard.press('Escape');
  await panel.waitFor({ state: 'hidden' });
  assert.doesNotMatch(page.url(), /image=/);
});

test('a wrong image is marked, and the mark is stored', async () => {
  const page = await open();
  await search(page, 'a green umbrella');
  const card = cards(page, 'column-balanced').first();
  const id = await idOf(card);
  await page.locator(`${one('column-balanced')} ${one('mark-wrong')}`).first().click();
  await page.waitForSelector(`${one('column-balanced')} [data-image-id="${id}"] ${one('mark-wrong')}[aria-pressed=true]`);
  await has(page, 'toast', /Noted: .* is wrong for “a green umbrella”/);
  await page.locator(`${one('column-balanced')} [data-image-id="${id}"] ${one('card')}`).click();
  await page.waitForSelector(one('histogram'));
  assert.equal(await page.getAttribute(one('verdict-wrong'), 'aria-pressed'), 'true');
  await page.fill(one('note'), 'it is green after all');
  await page.click(one('verdict-right'));
  await page.waitForSelector(`${one('verdict-right')}[aria-pressed=true]`);
  const said = stored(`${demo}/catalogue/feedback`).filter((one) => one.image_id === id);
  assert.deepEqual(said.map(({ text, verdict, note, configuration }) => [text, verdict, note, configuration]), [
    ['a green umbrella', 'wrong', undefined, 'initial'],
    ['a green umbrella', 'right', 'it is green after all', 'initial'],
  ]);
});

test('what is said of an image is of the query that found it', async () => {
  const page = await open();
  await search(page, 'a white kite');
  const id = await idOf(cards(page, 'column-balanced').first());
  await search(page, 'two blue guitars');
  await cards(page, 'column-balanced').first().click();
  await page.waitForSelector(one('histogram'));
  await page.goBack(); // out of the explanation too
  await page.waitForSelector('#explain', { state: 'hidden' });
  await page.waitForFunction(([first, wanted]) => document.querySelector(first)?.closest('li').dataset.imageId === wanted, [balanced, id]);
  const held = [];
  await page.route('**/v1/search', (route) => held.push(route));
  await page.fill(one('search-box'), 'a query that takes long');
  await page.click(one('search-button'));
  await page.waitForSelector('#results[aria-busy="true"]');
  assert.ok(await page.locator(one('more')).isDisabled()); // there are no pages of the new query yet
  await page.locator(`${one('column-balanced')} [data-image-id="${id}"] ${one('mark-wrong')}`).click();
  await has(page, 'toast', /is wrong for “a white kite”/);
  await Promise.all(held.map((route) => route.continue()));
  await page.unroute('**/v1/search');
  await page.waitForSelector('#results[aria-busy="false"]');
  assert.ok(await page.locator(one('more')).isEnabled());
  const said = stored(`${demo}/catalogue/feedback`).filter((one) => one.image_id === id && one.text === 'a white kite');
  assert.deepEqual(said.map(({ verdict }) => verdict), ['wrong']);
});

test('more like this looks for what is like a hit', async () => {
  const page = await open();
  await search(page, 'a yellow umbrella');
  const id = await idOf(cards(page, 'column-balanced').first());
  await page.click(`${one('column-balanced')} ${one('more-like')} >> nth=0`);
  await has(page, 'column-balanced', /Most similar/);
  assert.match(page.url(), new RegExp(`like=${id}`));
  assert.ok(await page.locator(one('query-picture')).isVisible());
  assert.notEqual(await idOf(cards(page, 'column-balanced').first()), id);
  await page.screenshot({ path: `${shots}/like.png` });
  await page.click(one('clear-query-picture'));
  await has(page, 'newest', /Newest pictures/);
});

test('a picture that is dropped is searched by, and its link brings it back', async () => {
  const page = await open();
  await search(page, 'a yellow umbrella');
  const card = cards(page, 'column-balanced').first();
  const [id, picture] = [await idOf(card), await card.getAttribute('data-picture')];
  const drop = (type) => page.evaluate(async ([type, picture]) => {
    const dataTransfer = new DataTransfer();
    const blob = await (await fetch(picture)).blob();
    dataTransfer.items.add(new File([blob], 'picture.jpg', { type: 'image/jpeg' }));
    document.body.dispatchEvent(new DragEvent(type, { dataTransfer, bubbles: true, cancelable: true }));
  }, [type, picture]);
  await drop('dragover');
  assert.ok(await page.locator(one('drop')).isVisible());
  await drop('drop');
  await has(page, 'column-balanced', /Most similar/);
  assert.equal(await idOf(cards(page, 'column-balanced').first()), id);
  assert.ok(await page.locator(one('drop')).isHidden());
  const { search: query, hash } = new URL(page.url());
  const again = await open({}, query + hash);
  await again.waitForSelector(balanced);
  assert.equal(await idOf(cards(again, 'column-balanced').first()), id);
});

test('a large picture is made small, and what is none is told', async () => {
  const page = await open();
  await page.waitForSelector(one('example'));
  const large = await page.evaluate(() => {
    const canvas = Object.assign(document.createElement('canvas'), { width: 1200, height: 900 });
    const context = canvas.getContext('2d');
    const noise = context.createImageData(1200, 900);
    for (let at = 0; at < noise.data.length; at += 65_536) crypto.getRandomValues(noise.data.subarray(at, at + 65_536));
    context.putImageData(noise, 0, 0);
    return canvas.toDataURL('image/png').split(',')[1];
  });
  const sent = page.waitForRequest((request) => request.url().endsWith('/v1/search'));
  await page.setInputFiles(one('file'), { name: 'large.png', mimeType: 'image/png', buffer: Buffer.from(large, 'base64') });
  const { image } = (await sent).postDataJSON();
  assert.ok(large.length > 1_000_000 && image.length < 150_000, `${image.length} of ${large.length}`);
  await page.waitForSelector(balanced);
  await page.setInputFiles(one('file'), { name: 'notes.txt', mimeType: 'text/plain', buffer: Buffer.from('no picture') });
  await has(page, 'toast', /notes.txt is not a picture/);
});

test('more adds the next page, also after its version is gone', async () => {
  const page = await open({}, '?q=a%20red%20mug', '410');
  await page.click(one('more'));
  await page.waitForSelector(`${balanced} >> nth=47`);
  const places = await page.locator(`${balanced} .rank`).allInnerTexts();
  assert.deepEqual(places, Array.from({ length: 48 }, (_, index) => String(index + 1)));
  await page.route('**/v1/search', (route) => {
    const gone = { status: 410, contentType: 'application/problem+json', body: '{"title":"Gone","status":410,"detail":"","code":"cursor_expired"}' };
    return route.request().postDataJSON().cursor ? route.fulfill(gone) : route.continue();
  });
  await page.click(one('more'));
  await page.waitForSelector(`${balanced} >> nth=71`);
  const again = await open({}, new URL(page.url()).search);
  await again.waitForSelector(`${balanced} >> nth=71`);
});

test('the catalogue changes before one’s eyes, with rate and lag', async () => {
  const page = await open();
  await page.waitForSelector(one('feed-item'), { timeout: 20_000 });
  await has(page, 'feed-metrics', /[1-9]\d* in the last/);
  await has(page, 'feed-metrics', /\d to searchable|\d s to searchable/);
  await has(page, 'feed-metrics', /\d waiting, 0 dead-lettered/);
  await page.click(one('pause'));
  await page.waitForFunction((pause) => /Resume \([1-9]/.test(document.querySelector(pause).innerText), one('pause'), { timeout: 20_000 });
});

test('results follow the catalogue', async () => {
  const page = await open();
  await search(page, 'a red mug');
  await page.waitForResponse((response) => response.url().endsWith('/v1/search'), { timeout: 20_000 });
});

test('results follow the catalogue where its changes are not heard', async () => {
  const page = await (await browser.newContext()).newPage();
  await page.route('**/v1/events', (route) => route.abort());
  await page.goto(url);
  await page.waitForSelector(one('example'));
  await search(page, 'a red mug');
  await page.waitForResponse((response) => response.url().endsWith('/v1/search'), { timeout: 20_000 });
});

test('what is wrong is said', async () => {
  const page = await open({}, '', '422');
  await search(page, 'a red mug');
  await page.fill(one('search-box'), 'x'.repeat(2000));
  await page.click(one('search-button'));
  await page.waitForSelector(`${one('error')}:visible`);
  assert.match(await page.locator(one('error')).innerText(), /2000 characters/);
});

test('a busy server is asked again when it said', async () => {
  const page = await open({}, '', '429');
  await page.waitForSelector(one('example'));
  const busy = { status: 429, contentType: 'application/problem+json', body: '{"title":"Too Many Requests","status":429,"detail":"64 requests are being computed","code":"too_many_requests","retry_after":2}' };
  await page.route('**/v1/search', (route) => route.fulfill(busy), { times: 1 });
  await page.fill(one('search-box'), 'a red mug');
  await page.click(one('search-button'));
  await has(page, 'error', /Busy: 64 requests.*trying again in [12] s/);
  await page.waitForSelector(balanced);
  assert.ok(await page.locator(one('error')).isHidden());
});

test('a server that is gone is told, and its return too', async () => {
  const page = await open();
  await search(page, 'a red mug');
  const known = faults.length;
  await page.route('**/v1/**', (route) => route.abort());
  await page.fill(one('search-box'), 'a blue mug');
  await page.click(one('search-button'));
  await has(page, 'error', /cannot be reached/);
  await page.unroute('**/v1/**');
  await page.click(one('try-again'));
  await page.waitForSelector(one('error'), { state: 'hidden' });
  faults.splice(known); // the browser tells each request that was cut
});

test('a server that asks for a key gets one, once', async () => {
  const { address, key, server } = await keyed();
  try {
    const page = await open({}, '?q=a%20red%20mug', '401', address);
    await page.waitForSelector(`${one('sign-in-dialog')}:visible`);
    await page.keyboard.press('Escape');
    assert.ok(await page.locator(one('sign-in-dialog')).isVisible());
    await page.screenshot({ path: `${shots}/sign-in.png` });
    await page.fill(one('key'), 'bsap_nonsense');
    await page.click(one('sign-in'));
    await has(page, 'key-problem', /this key is not accepted/);
    await page.fill(one('key'), key);
    await page.keyboard.press('Enter');
    await page.waitForSelector(balanced);
    await has(page, 'session', /shop/);
    await page.waitForSelector(`${one('live')}[data-connected=true]`);
    await picturesLoaded(page, `${balanced} img`);
    // This server does not know what its images show.
    assert.deepEqual(await (await fetch(`${address}v1/sample-score`, { headers: { authorization: `Bearer ${key}` } })).json(), { known: false, score: null });
    assert.equal(await page.locator(one('mark')).count(), 0);
    // The key may search, and that alone.
    assert.equal(await page.locator(one('mark-wrong')).count(), 0);
    await page.reload();
    await page.waitForSelector(balanced);
    await page.goto(address);
    await page.waitForSelector(one('newest-card'));
    assert.ok(await page.locator(one('score')).isHidden());
    await page.click(one('sign-out'));
    await page.waitForSelector(`${one('sign-in-dialog')}:visible`);
  } finally {
    server.kill('SIGTERM');
    await once(server, 'exit');
  }
});

test('a query in a script that the model does not know is told', async () => {
  const page = await open();
  await search(page, '赤いマグカップ');
  await has(page, 'warning', /not multilingual/);
  await search(page, 'a red mug');
  await page.waitForSelector(one('warning'), { state: 'hidden' });
});

test('a link brings the view back', async () => {
  const page = await open();
  await search(page, 'a yellow umbrella');
  await page.click(`label:has(${one('normaliser-zscore')})`);
  await page.locator(one('weight')).fill('0.4');
  await page.selectOption(one('prompt-set'), 'photographs');
  await page.click(`${one('filter-pattern')} summary`);
  await page.check(`${one('filter-pattern')} input[value=plain]`);
  await has(page, 'column-balanced', /Z-score, weight 0.40/);
  const again = await open({}, new URL(page.url()).search);
  await again.waitForSelector(balanced);
  assert.equal(await again.inputValue(one('search-box')), 'a yellow umbrella');
  assert.equal(await again.inputValue(one('prompt-set')), 'photographs');
  assert.equal(await again.inputValue(one('weight')), '0.4');
  assert.ok(await again.isChecked(one('normaliser-zscore')));
  await has(again, 'filter-pattern', /pattern: plain/);
  await again.click(one('link'));
  await has(again, 'toast', /Link copied/);
  await again.goBack();
  await again.goForward();
  await has(again, 'column-balanced', /Z-score, weight 0.40/);
});

test('the keyboard is enough', async () => {
  const page = await open();
  await page.waitForSelector(one('example'));
  await page.keyboard.press('/');
  await page.keyboard.type('a red mug');
  await page.keyboard.press('Enter');
  await page.waitForSelector(balanced);
  const focused = () => page.evaluate(() => document.activeElement.dataset.test ?? document.activeElement.id);
  for (let steps = 0; (await focused()) !== 'card'; steps += 1) {
    assert.ok(steps < 60, 'Tab does not come to the results');
    await page.keyboard.press('Tab');
  }
  const place = () => page.evaluate(() => document.activeElement.querySelector('.rank').innerText);
  await page.keyboard.press('ArrowRight');
  assert.equal(await place(), '2');
  await page.keyboard.press('ArrowLeft');
  assert.equal(await place(), '1');
  await page.keyboard.press('Enter');
  await page.waitForSelector(one('histogram'));
  await page.keyboard.press('Escape');
  await page.locator(one('explain')).waitFor({ state: 'hidden' });
  assert.equal(await focused(), 'card');
});

test('every control has a name', async () => {
  const page = await open();
  await search(page, 'a red mug');
  const nameless = await page.evaluate(() => {
    const named = (node) => node.innerText?.trim() || node.getAttribute('aria-label') || node.labels?.[0]?.innerText.trim() || node.title;
    return [...document.querySelectorAll('button, input, select, summary')].filter((node) => node.checkVisibility() && !named(node)).map((node) => node.outerHTML.slice(0, 80));
  });
  assert.deepEqual(nameless, []);
});

test('a telephone and the dark are served too', async () => {
  const page = await open({ viewport: { width: 390, height: 844 }, isMobile: true, hasTouch: true, colorScheme: 'dark' }, '?q=a%20blue%20dotted%20backpack');
  await page.waitForSelector(balanced);
  const fits = async (what) => {
    const width = await page.evaluate(() => document.documentElement.scrollWidth);
    assert.ok(width <= 390, `${what} is ${width} pixels wide`);
  };
  await fits('the page');
  await page.screenshot({ path: `${shots}/mobile.png` });
  await page.tap(`label:has(${one('tab-raw')})`);
  await page.waitForSelector(`${one('column-raw')} ${one('card')}:visible`);
  assert.equal(await page.locator(`${balanced}:visible`).count(), 0);
  assert.match(page.url(), /shown=raw/);
  await page.tap(`${one('settings')} summary`);
  await page.tap(`${one('filter-kind')} summary`);
  const drawer = await page.locator('.drawer:visible').boundingBox();
  assert.ok(drawer.x >= 0 && drawer.x + drawer.width <= 390 && drawer.y + drawer.height <= 844, JSON.stringify(drawer));
  await page.screenshot({ path: `${shots}/mobile-filter.png` });
  await page.keyboard.press('Escape');
  await page.tap(`${one('column-raw')} ${one('card')} >> nth=0`);
  await page.waitForSelector(one('histogram'));
  await fits('the explanation');
  await page.screenshot({ path: `${shots}/mobile-explain.png` });
});

test('who wants calm gets it', async () => {
  const page = await open({ reducedMotion: 'reduce', colorScheme: 'dark' });
  await search(page, 'a red mug');
  await search(page, 'three white candles');
  assert.equal(await page.evaluate(() => document.getAnimations().length), 0);
  await page.screenshot({ path: `${shots}/dark.png` });
});

test('that nothing matches is said once that is calibrated', async () => {
  const page = await open();
  await search(page, 'qwv xlkjh zzkw');
  await has(page, 'status', /match threshold not calibrated/);
  const { hits } = await json('v1/search', { text: 'a mug', k: 200 });
  const judged = new Map();
  for (const { image_id, attributes: { title } } of hits) {
    for (const text of [title, `photo of ${title}`, title.replace(/^an? /, '')]) judged.set(text, (judged.get(text) ?? new Set()).add(image_id));
  }
  writeFileSync(`${demo}/judged.jsonl`, [...judged].map(([text, relevant]) => JSON.stringify({ text, relevant: [...relevant] })).join('\n'));
  bsap('evaluate', '--queries', `${demo}/judged.jsonl`, '--calibrate', 'live', '--store');
  await page.waitForSelector(`${one('no-match')}:visible`, { timeout: 20_000 });
  await has(page, 'no-match', /Probably nothing here matches.*unrelated texts score as high/);
  await page.screenshot({ path: `${shots}/no-match.png` });
  await search(page, hits[0].attributes.title);
  await page.waitForSelector(one('no-match'), { state: 'hidden' });
  await page.waitForSelector(one('uncalibrated'), { state: 'detached' });
});

test('a candidate is tried beside what is live, and counted', async () => {
  const page = await open();
  await search(page, 'a red mug');
  assert.ok(await page.locator(one('configuration')).isHidden());
  bsap('candidate', 'set', 'half', '--normaliser', 'nnn', '--weight', '0.5', '--shadow', '1', '--traffic-share', '0.1');
  await page.click(`label:has(${one('configuration-half')})`, { timeout: 20_000 });
  await has(page, 'column-balanced', /NNN, weight 0.50/);
  assert.match(page.url(), /configuration=half/);
  await has(page, 'candidate-traffic', /Queries answered: half [1-9]\d* .*, initial \d+/);
  await page.click(`label:has(${one('configuration-live')})`);
  await has(page, 'candidate-traffic', /Queries answered: half [1-9]\d* .*, initial [1-9]\d*\. Shadow queries: [1-9]\d*, with \d+/);
  await page.waitForTimeout(600); // until pictures have come to their places
  await page.screenshot({ path: `${shots}/candidate.png` });
  await page.click(`label:has(${one('configuration-half')})`);
  bsap('candidate', 'withdraw');
  await page.waitForSelector(one('configuration'), { state: 'hidden', timeout: 20_000 });
  await has(page, 'toast', /half is no longer a candidate/);
  await has(page, 'column-balanced', /NNN, weight 0.25/);
});

test('answers obey the limits and the policy', async () => {
  const page = await fetch(url);
  const policy = page.headers.get('content-security-policy');
  assert.match(policy, /default-src 'none'/);
  assert.equal(page.headers.get('x-content-type-options'), 'nosniff');
  const post = (body) => fetch(`${url}v1/search`, { method: 'POST', headers: { 'content-type': 'application/json' }, body });
  const cases = [
    ['{"text":""}', 422, 'invalid_field'],
    ['{"text":"a","k":0}', 422, 'invalid_field'],
    ['{"text":"a","weight":2}', 422, 'invalid_field'],
    ['{"text":"a","prompt_set":"nope"}', 422, 'invalid_field'],
    ['{"text":"a","normaliser":"nope"}', 422, 'invalid_body'],
    ['{"text":"a","colour":"red"}', 422, 'invalid_body'],
    ['nonsense', 400, 'invalid_body'],
    [`{"text":"${'x'.repeat(13_000_000)}"}`, 413, 'invalid_body'],
  ];
  for (const [body, status, code] of cases) {
    const answer = await post(body);
    assert.equal(answer.status, status, body.slice(0, 60));
    assert.equal(answer.headers.get('content-type'), 'application/problem+json');
    assert.equal((await answer.json()).code, code);
  }
  for (const [path, status] of [['nowhere', 404], ['v1/images?id=nobody', 404], ['v1/images/picture?id=nobody', 404], ['v1/images', 400], ['v1/search', 405], ['v1/images/newest?limit=3', 200], ['v1/images/newest?limit=0', 422], ['v1/images/newest', 400], ['livez', 200], ['readyz', 200]]) {
    assert.equal((await fetch(url + path)).status, status, path);
  }
});

test('the page made no errors', () => {
  assert.deepEqual(faults, []);
});
