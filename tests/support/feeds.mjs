/**
 * Follows tables with static/feed.js, and answers every line on standard input with what it has: a JSON array of
 * {state, states, problem, keys, rows, changes, batches, loads, connections, open, attempts, reported} for each Feed.
 *
 * Argument: a JSON array of options for Feed. `manager: true` has it use a Manager that it shares; `stopIn: 'onload
 * 1'` has it stop in the first call of that callback, `'live 2'` when it is told for the second time that it is live,
 * and `againIn` start at once after that; `failing: true` has all its callbacks throw. `states` are all so far;
 * `changes` and `batches` (how many changes each had) are those since the last line, `loads` counts the lists. Of all
 * Feeds together, `connections` counts those they have opened, `open` those that are open, `attempts` how often they
 * have tried to connect, and `reported` the errors of callbacks. A line `stop N` stops the Feed of that number, `start
 * N` starts it.
 */

import { createInterface } from 'node:readline';
import { Manager, io } from 'socket.io-client';
import { Feed } from '../../static/feed.js';

const managers = new Set();
let attempts = 0;
function count(manager) {
  if (managers.has(manager)) return;
  managers.add(manager);
  manager.on('reconnect_attempt', () => (attempts += 1));
}
const counted = (url, options) => {
  const socket = io(url, options);
  count(socket.io);
  return socket;
};
let shared;

const FAILURE = new Error('a callback fails');
let reported = 0;
process.on('uncaughtException', (error) => {
  if (error !== FAILURE) throw error;
  reported += 1;
});

function follow({ manager, stopIn, againIn, failing, ...options }) {
  if (manager) count((shared ??= new Manager(options.server, { path: '/socket.io-client' })));
  const feed = new Feed({ io: manager ? shared : counted, ...options });
  const seen = { feed, states: [], changes: [], batches: [], loads: 0 };
  let untold = 0; // changes that were in no batch yet
  let isStopped = false;
  seen.stop = () => {
    feed.stop();
    [untold, isStopped] = [0, true];
  };
  seen.start = () => {
    isStopped = false;
    feed.start();
  };
  const calls = {}; // how often each callback was called, and each state told
  const called = (name) => {
    calls[name] = (calls[name] ?? 0) + 1;
    const place = `${name} ${calls[name]}`;
    if (place === stopIn || place === againIn) seen.stop();
    if (place === againIn) seen.start();
  };
  /** A callback that does this, and after it what the options say. */
  const callback = (name, act) => (argument) => {
    if (isStopped) throw new Error(`${name} is called after stop()`);
    act(argument);
    called(name === 'onstate' ? argument.name : name);
    if (failing) throw FAILURE;
  };
  feed.onstate = callback('onstate', ({ name }) => seen.states.push(name));
  feed.onload = callback('onload', () => {
    if (untold) throw new Error('a batch comes after the list that replaces its rows');
    seen.loads += 1;
  });
  feed.onchange = callback('onchange', (change) => {
    untold += 1;
    seen.changes.push(change);
  });
  feed.onbatch = callback('onbatch', (changes) => {
    if (changes.length !== untold) throw new Error('a batch is not the changes since the last one');
    untold = 0;
    seen.batches.push(changes.length);
  });
  feed.start();
  return seen;
}

const followed = JSON.parse(process.argv[2]).map(follow);
createInterface({ input: process.stdin })
  .on('line', (line) => {
    const [command, number] = line.split(' ');
    if (command) followed[Number(number)][command]();
    const answer = followed.map(({ feed, states, changes, batches, loads }) => {
      const keysAgree = [...feed.items].every(([key, row]) => feed.keyOf(row) === key);
      if (!keysAgree) throw new Error('a row is not under its key');
      return {
        state: feed.state.name,
        states,
        problem: feed.state.problem ?? null,
        keys: [...feed.items.keys()],
        rows: [...feed.items.values()],
        changes: changes.splice(0),
        batches: batches.splice(0),
        loads,
        connections: managers.size,
        open: [...managers].filter(({ engine }) => engine.readyState !== 'closed').length,
        attempts,
        reported,
      };
    });
    process.stdout.write(`${JSON.stringify(answer)}\n`);
  })
  .on('close', () => process.exit());
