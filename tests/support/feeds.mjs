/**
 * Follows tables with static/feed.js, and answers every line on standard input with what it has: a JSON array of
 * {state, states, problem, keys, rows, changes, batches, loads, connections, attempts} for each Feed.
 *
 * Argument: a JSON array of options for Feed; `manager: true` has it use a Manager that it shares. `states` are all so
 * far; `changes` and `batches` (how many changes each had) are those since the last line, `loads` counts the lists.
 * `connections` counts those that all Feeds together have opened, `attempts` how often they have tried to. A line
 * `stop N` stops the Feed of that number, `start N` starts it.
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

function follow({ manager, ...options }) {
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
  const requireRunning = () => {
    if (isStopped) throw new Error('a callback is called after stop()');
  };
  feed.onstate = ({ name }) => {
    requireRunning();
    seen.states.push(name);
  };
  feed.onload = () => {
    requireRunning();
    if (untold) throw new Error('a batch comes after the list that replaces its rows');
    seen.loads += 1;
  };
  feed.onchange = (change) => {
    requireRunning();
    untold += 1;
    seen.changes.push(change);
  };
  feed.onbatch = (changes) => {
    if (changes.length !== untold) throw new Error('a batch is not the changes since the last one');
    untold = 0;
    seen.batches.push(changes.length);
  };
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
        attempts,
      };
    });
    process.stdout.write(`${JSON.stringify(answer)}\n`);
  })
  .on('close', () => process.exit());
