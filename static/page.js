/** The page: connects the feed to the list, the recent changes, the form and the connection status. */

import { io } from './socket.io-client/socket.io.esm.min.js';
import { Feed } from './feed.js';
import { ThingList } from './list.js';
import { Announcer, Recent } from './recent.js';
import { about, create } from './rest.js';
import { complain, forgive, setBusy } from './row.js';
import { counted, sentenceFor, wordsFor } from './words.js';

// Names are unique; this one is different each time.
const EXAMPLE = "insert into things (name) values ('psql at ' || localtime(3))";
const CAUGHT_UP_SHOWN_MS = 6_000;
// Things may be watched again soon, by a migration, say.
const ASK_AGAIN_MS = 30_000;

const element = (id) => document.getElementById(id);

const feed = new Feed({ io, topic: 'thing', timing: true });
const things = new ThingList(element('things'), feed.items);
const recent = new Recent(element('recent'), element('recent-empty'), element('pace'));
const announcer = new Announcer(element('announcement'));

let loaded = false;
let wasLive = false;
let hidden = ''; // the notice over the page that the user has hidden
let calmDown;

feed.onload = () => {
  loaded = true;
  things.reload();
};

feed.onbatch = (changes) => {
  things.changed(changes);
  for (const change of changes) {
    recent.add(change);
    announcer.add(change);
  }
};

feed.onstate = (state) => {
  if (state.name === 'live') {
    wasLive = true;
    forgive();
  }
  if (state.name === 'refused') setTimeout(() => feed.start(), ASK_AGAIN_MS);
  clearTimeout(calmDown);
  say(state);
  notice();
};

things.onpainted = (waiting) => {
  recent.painted();
  element('held').hidden = waiting === 0;
  if (waiting) setText('held', `${counted(waiting, 'new row')}`);
  notice();
};
things.onsay = (sentence) => announcer.say(sentence);
element('held').addEventListener('click', () => {
  element('things-title').focus();
  things.release();
});

function say(state) {
  const caughtUp = state.missed > 0 || state.reloaded;
  if (caughtUp) calmDown = setTimeout(() => say({ name: 'live' }), CAUGHT_UP_SHOWN_MS);
  element('state').dataset.state = state.name;
  setText('state', wordsFor(state, wasLive));
}

/** The notice shown instead of the rows, or over the page when there are some. */
function notice() {
  const { size } = feed.items;
  const trouble = sentenceFor(feed.state);
  let text = trouble;
  if (!trouble && !loaded) text = 'Loading the things…';
  else if (!trouble && size === 0) text = 'No things yet. Add the first one above, or from a terminal.';
  const { classList } = element('notice');
  if (classList.contains('above') !== size > 0) classList.toggle('above', size > 0);
  if (text !== hidden) hidden = '';
  const shown = text !== '' && text !== hidden;
  if (element('notice').hidden === shown) element('notice').hidden = !shown;
  setText('notice-text', text);
  setText('count', loaded ? counted(size, 'row') : '');
}

element('hide').addEventListener('click', () => {
  hidden = element('notice-text').textContent;
  notice();
});

function setText(id, text) {
  if (element(id).textContent !== text) element(id).textContent = text;
}

element('add').addEventListener('input', () => complain(element('add'), null));
element('add').addEventListener('submit', async (event) => {
  event.preventDefault();
  const form = event.target;
  const { name, info } = form.elements;
  if (form.ariaBusy === 'true') return; // a second click before the first was answered
  setBusy(form, true);
  complain(form, null);
  try {
    await create({ name: name.value, info: info.value });
    form.reset();
    name.focus();
  } catch (problem) {
    complain(form, problem);
  } finally {
    setBusy(form, false);
  }
});

element('copy').addEventListener('click', async () => {
  const command = element('command');
  const button = element('copy');
  try {
    await navigator.clipboard.writeText(command.textContent);
    button.textContent = 'Copied';
  } catch {
    // There is no clipboard without a secure origin: select the line, so that it can be copied with the keyboard.
    getSelection().selectAllChildren(command);
    button.textContent = 'Selected';
  }
  setTimeout(() => (button.textContent = 'Copy'), 2_000);
});

/** Show what this server is: the command that reaches its database, and whether it has things at all. */
async function start() {
  const server = await about();
  if (server?.psql) {
    element('command').textContent = `${server.psql} -c "${EXAMPLE}"`;
    element('try-where').hidden = !server.psql.includes('$DATABASE_URL');
    element('try').hidden = false;
  }
  if (server?.things === false) {
    document.body.classList.add('without-things');
  } else {
    feed.start();
  }
}

start();
