/**
 * Follows tables with static/feed.js, and answers every line on standard input with what it has: a JSON array of
 * {state, problem, keys, rows, changes, batches, loads, connections} for each Feed.
 *
 * Argument: a JSON array of options for Feed. `changes` and `batches` (how many changes each had) are those since the
 * last line, `loads` counts the lists. `connections` counts those that all Feeds together have opened. A line `stop N` stops
 * the Feed of that number, `start N` starts it.
 */

import { createInterface } from 'node:readline';
import { io } from 'socket.io-client';
import { Feed } from '../../static/feed.js';

const managers = new Set();
const counted = (url, options) => {
  const socket = io(url, options);
  managers.add(socket.io);
  return socket;
};

function follow(options) {
  const feed = new Feed({ io: counted, ...options });
  const seen = { feed, changes: [], batches: [], loads: 0 };
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
  feed.onstate = () => {
    if (isStopped) throw new Error('a callback is called after stop()');
  };
  feed.onload = () => {
    feed.onstate();
    if (untold) throw new Error('a batch comes after the list that replaces its rows');
    seen.loads += 1;
  };
  feed.onchange = (change) => {
    feed.onstate();
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
    const answer = followed.map(({ feed, changes, batches, loads }) => {
      const keysAgree = [...feed.items].every(([key, row]) => feed.keyOf(row) === key);
      if (!keysAgree) throw new Error('a row is not under its key');
      return {
        state: feed.state.name,
        problem: feed.state.problem ?? null,
        keys: [...feed.items.keys()],
        rows: [...feed.items.values()],
        changes: changes.splice(0),
        batches: batches.splice(0),
        loads,
        connections: managers.size,
      };
    });
    process.stdout.write(`${JSON.stringify(answer)}\n`);
  })
  .on('close', () => process.exit());
