/**
 * Starts Feeds of the topic `order` one after the other, stops and forgets them: prints how many of them still hold
 * their rows.
 *
 * Argument: URL of the server. Needs `node --expose-gc`.
 */

import { setTimeout } from 'node:timers/promises';
import { Manager, io } from 'socket.io-client';
import { Feed } from '../../static/feed.js';

const FEEDS = 20;
const server = process.argv[2];
const shared = new Manager(server, { path: '/socket.io-client' });

/** A Feed that is stopped in this state; returns a weak reference to its rows. */
async function comeAndGo(io, state) {
  const feed = new Feed({ io, server, topic: 'order' });
  await new Promise((resolve) => {
    feed.onstate = ({ name }) => name === state && resolve();
    feed.start();
  });
  feed.stop();
  return new WeakRef(feed.items);
}

const rows = [];
for (let number = 0; number < FEEDS; number += 1) {
  rows.push(await comeAndGo(number % 2 ? io : shared, ['connecting', 'loading', 'live'][number % 3]));
}
// Nothing is freed that was looked at just now; and answers to CONNECT may be on their way.
let held = FEEDS;
for (let tries = 0; held && tries < 100; tries += 1) {
  await setTimeout(100);
  global.gc();
  held = rows.filter((each) => each.deref()).length;
}
console.log(held);
process.exit();
