/** static/feed.js as a TypeScript program sees it; only checked, never run. */

import { Manager, io } from 'socket.io-client';
import { Feed, type Change, type State } from '../../static/feed.js';

interface Order {
  id: number;
  status: string;
}

const feed = new Feed<Order>({ io, topic: 'order', where: 'status=eq.open', columns: ['id', 'status'] });
feed.onload = (items) => [...items.values()].map(({ status }) => status.trim());
feed.onchange = ({ op, row, before, writtenAt }) => [op === 'update', row?.status, before?.id, writtenAt?.toFixed()];
feed.onbatch = (changes: Change<Order>[]) => changes.length;
feed.onstate = (state: State) => {
  if (state.name === 'refused') return [state.problem.code, state.problem.detail, state.asOf];
  if (state.name === 'connecting') return state.problem?.status;
  return state.name === 'live' ? state.missed : state.asOf?.getTime();
};
feed.start();
const known: Order | undefined = feed.items.get(feed.keyOf({ id: 1 }));
feed.stop();

new Feed({ io: new Manager('https://example.org'), topic: 'order', old: true, label: 'all' });

// @ts-expect-error: a topic is needed
new Feed({ io });
// @ts-expect-error: an option that there is not
new Feed({ io, topic: 'order', list: 'api/orders' });
// @ts-expect-error: a column that an order does not have
feed.onchange = ({ row }) => row?.colour;
// @ts-expect-error: only a refusal says what is wrong with the options
feed.onstate = (state) => state.problem.field;
export { known };
