/**
 * Follows tables with static/feed.js, and answers every line on standard input with what it has: a JSON array with
 * [state, keys, rows, changes] for each table.
 *
 * Argument: a JSON array of options for Feed. `changes` are those since the last line: [op, key, name, too large].
 */

import { createInterface } from 'node:readline';
import { io } from 'socket.io-client';
import { Feed } from '../../static/feed.js';

const followed = JSON.parse(process.argv[2]).map((options) => {
  const feed = new Feed({ io, ...options });
  const changes = [];
  feed.onchange = ({ op, key, name, row }) => changes.push([op, key, name, row?.too_large === true]);
  feed.start();
  return { feed, changes };
});
createInterface({ input: process.stdin })
  .on('line', () => {
    const answer = followed.map(({ feed, changes }) => {
      const keysAgree = [...feed.items].every(([key, row]) => feed.keyOf(row) === key);
      if (!keysAgree) throw new Error('a row is not under its key');
      return [feed.state.name, [...feed.items.keys()], [...feed.items.values()], changes.splice(0)];
    });
    process.stdout.write(`${JSON.stringify(answer)}\n`);
  })
  .on('close', () => process.exit());
