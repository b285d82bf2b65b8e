// The page of a running demo (BSAP_URL) in headless Chromium.
import assert from 'node:assert/strict';
import { mkdirSync } from 'node:fs';
import { after, before, test } from 'node:test';
import { chromium } from 'playwright-core';

const url = process.env.BSAP_URL;
const shots = process.env.SCREENSHOTS;
const one = (name) => `[data-test=${name}]`;
const faults = [];
let browser;

before(async () => {
  mkdirSync(shots, { recursive: true });
  browser = await chromium.launch({
    executablePath: process.env.CHROMIUM,
    args: ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking'],
  });
});
after(() => browser.close());

/** `expected`: the status of requests that this test lets fail. */
async function open(options = {}, path = '', expected = '404') {
  const context = await browser.newContext({ viewport: { width: 1280, height: 900 }, ...options });
  const page = await context.newPage();
  page.on('pageerror', (error) => faults.push(error.stack));
  // A picture may be deleted between the answer and its request: the live catalogue does that.
  page.on('console', (message) => {
    const known = ['404', expected].some((status) => message.text().includes(`status of ${status}`));
    if (message.type() === 'error' && !known) faults.push(message.text());
  });
  await page.goto(url + path);
  return page;
}

async function search(page, text) {
  await page.fill(one('search-box'), text);
  await page.click(one('search-button'));
  await page.waitForSelector(`${one('column-balanced')} ${one('card')}`);
}

const cards = (page, column) => page.locator(`${one(column)} ${one('card')}`);

test('the page says what it serves and what stands in for real parts', async () => {
  const page = await open();
  await page.waitForSelector(one('example'));
  const state = await (await fetch(`${url}v1/state`)).json();
  assert.equal(state.ready, true);
  assert.match(await page.locator('header').innerText(), new RegExp(state.model.name));
  assert.equal(await page.locator(one('notice')).isVisible(), state.model.notice !== null);
  assert.ok(await page.locator(one('stand-ins')).isVisible());
});

test('an example shows raw and balanced results side by side', async () => {
  const page = await open();
  await page.click(`${one('example')} >> nth=0`);
  await page.waitForSelector(`${one('column-balanced')} ${one('card')}`);
  const [raw, balanced] = [await cards(page, 'column-raw').count(), await cards(page, 'column-balanced').count()];
  assert.equal(raw, balanced);
  assert.ok(raw >= 10);
  assert.match(page.url(), /q=/);
  await page.waitForFunction(
    (selector) => [...document.querySelectorAll(selector)].slice(0, 4).every((i) => i.complete && i.naturalWidth > 0),
    `${one('column-raw')} ${one('card')} img`,
  );
  await page.screenshot({ path: `${shots}/results.png` });
});

test('weight 0 is plain CLIP in both columns', async () => {
  const page = await open();
  await search(page, 'a red mug');
  await page.locator(one('weight')).fill('0');
  await page.waitForFunction(
    ([raw, balanced]) => {
      const texts = (selector) => [...document.querySelectorAll(selector)].map((card) => card.innerText.split('\n').find((line) => line.length > 4));
      const [a, b] = [texts(raw), texts(balanced)];
      return a.length > 0 && a.every((text, i) => text === b[i]);
    },
    [`${one('column-raw')} ${one('card')}`, `${one('column-balanced')} ${one('card')}`],
  );
});

test('a card explains why it ranks where it does', async () => {
  const page = await open();
  await search(page, 'a yellow umbrella');
  await cards(page, 'column-balanced').first().click();
  const panel = page.locator(one('explain'));
  await panel.waitFor();
  await page.waitForSelector(one('histogram'));
  const text = await panel.innerText();
  assert.match(text, /This image gives the query/);
  assert.match(text, /raw \+ β|α/);
  await page.screenshot({ path: `${shots}/explain.png` });
  await page.keyboard.press('Escape');
  await panel.waitFor({ state: 'hidden' });
});

test('the catalogue changes before one’s eyes', async () => {
  const page = await open();
  await page.waitForSelector(one('feed-item'), { timeout: 20_000 });
  await page.screenshot({ path: `${shots}/feed.png` });
});

test('what is wrong is said', async () => {
  const page = await open({}, '', '422');
  await search(page, 'a red mug');
  await page.evaluate((box) => document.querySelector(box).removeAttribute('maxlength'), one('search-box'));
  await page.fill(one('search-box'), 'x'.repeat(2000));
  await page.click(one('search-button'));
  await page.waitForSelector(`${one('error')}:visible`);
  assert.match(await page.locator(one('error')).innerText(), /2000 characters/);
});

test('a query in a script that the model does not know is told', async () => {
  const page = await open();
  await search(page, '赤いマグカップ');
  await page.waitForSelector(`${one('warning')}:visible`);
  assert.match(await page.locator(one('warning')).innerText(), /not multilingual/);
  await search(page, 'a red mug');
  await page.waitForSelector(one('warning'), { state: 'hidden' });
});

test('a telephone and the dark are served too', async () => {
  const page = await open({ viewport: { width: 390, height: 844 }, isMobile: true, hasTouch: true, colorScheme: 'dark' }, '?q=a%20blue%20dotted%20backpack');
  await page.waitForSelector(`${one('column-balanced')} ${one('card')}`);
  const width = await page.evaluate(() => document.documentElement.scrollWidth);
  assert.ok(width <= 390, `the page is ${width} pixels wide`);
  await page.screenshot({ path: `${shots}/mobile.png` });
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
    [`{"text":"${'x'.repeat(100_000)}"}`, 413, 'invalid_body'],
  ];
  for (const [body, status, code] of cases) {
    const answer = await post(body);
    assert.equal(answer.status, status, body.slice(0, 60));
    assert.equal(answer.headers.get('content-type'), 'application/problem+json');
    assert.equal((await answer.json()).code, code);
  }
  for (const [path, status] of [['nowhere', 404], ['v1/images/nobody', 404], ['v1/images/nobody/picture', 404], ['v1/search', 405], ['livez', 200], ['readyz', 200]]) {
    assert.equal((await fetch(url + path)).status, status, path);
  }
});

test('the page made no errors', () => {
  assert.deepEqual(faults, []);
});
