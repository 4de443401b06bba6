/** The page: connects the feed to the list, the recent changes, the form and the connection status. */

import { io } from './socket.io-client/socket.io.esm.min.js';
import { Feed } from './feed.js';
import { ThingList, complain } from './list.js';
import { Announcer, Recent } from './recent.js';
import { create } from './rest.js';

const CAUGHT_UP_SHOWN_MS = 6_000;

const element = (id) => document.getElementById(id);

const feed = new Feed({ io, list: 'api/things', topic: 'thing', timing: true });
const things = new ThingList(element('things'), feed.items);
const recent = new Recent(element('recent'), element('recent-empty'), element('pace'));
const announcer = new Announcer(element('announcement'));

let loaded = false;
let wasLive = false;
let calmDown;

feed.onload = () => {
  loaded = true;
  things.reload();
};

feed.onchange = (change) => {
  things.changed(change);
  recent.add(change);
  announcer.add(change);
};

feed.onstate = (state) => {
  if (state.name === 'live') wasLive = true;
  clearTimeout(calmDown);
  say(state);
  notice();
};

things.onpainted = notice;

function say(state) {
  const caughtUp = state.missed > 0 || state.reloaded;
  if (caughtUp) calmDown = setTimeout(() => say({ name: 'live' }), CAUGHT_UP_SHOWN_MS);
  element('state').dataset.state = state.name;
  const words = wordsFor(state);
  if (element('state').textContent !== words) element('state').textContent = words;
}

function wordsFor({ name, problem, missed, reloaded }) {
  if (name === 'loading') return problem ? 'Waiting for the server' : 'Loading';
  if (name === 'connecting') return wasLive ? 'Reconnecting' : 'Connecting';
  if (name === 'returning') return 'Catching up';
  if (reloaded) return 'Live again, list reloaded';
  if (missed > 0) return `Live again, caught up ${missed.toLocaleString()} ${missed === 1 ? 'change' : 'changes'}`;
  return 'Live';
}

/** The notice shown instead of the rows, or above them. */
function notice() {
  const { size } = feed.items;
  const { problem } = feed.state;
  let text = '';
  if (problem?.status === 503) text = 'The database is unavailable. The list will load as soon as it is back.';
  else if (problem) text = `${problem.message} This page keeps trying.`;
  else if (!loaded) text = 'Loading the things…';
  else if (size === 0) text = 'No things yet. Add the first one above, or from a terminal.';
  element('notice').hidden = !text;
  element('notice').classList.toggle('above', size > 0);
  element('notice').textContent = text;
  element('count').textContent = loaded ? `${size.toLocaleString()} ${size === 1 ? 'row' : 'rows'}` : '';
}

element('add').addEventListener('submit', async (event) => {
  event.preventDefault();
  const form = event.target;
  const { name, info } = form.elements;
  if (form.ariaBusy === 'true') return; // a second click before the first was answered
  form.ariaBusy = 'true';
  complain(form, null);
  try {
    await create({ name: name.value, info: info.value });
    form.reset();
    name.focus();
  } catch (problem) {
    complain(form, problem);
  } finally {
    form.ariaBusy = 'false';
  }
});

element('copy').addEventListener('click', async () => {
  const command = element('command');
  const button = element('copy');
  try {
    await navigator.clipboard.writeText(command.textContent);
    button.textContent = 'Copied';
  } catch {
    // No clipboard without a secure origin: select the line, so that it can be copied with the keyboard.
    getSelection().selectAllChildren(command);
    button.textContent = 'Selected';
  }
  setTimeout(() => (button.textContent = 'Copy'), 2_000);
});

feed.start();
