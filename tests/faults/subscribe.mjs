/**
 * Holds subscriptions with the official JavaScript client, each client with several namespaces on one connection,
 * and writes down everything they receive, one JSON line each, which begins with the namespace:
 *
 *   [namespace, "ask", n]                        CONNECT is sent, with the options numbered n
 *   [namespace, "hello", recovered, offset, socket.recovered]   the last is null if the client was held: answered
 *                                                before the server knew where it continues, so that it is false
 *   [namespace, "rows", rows]                    a part of a snapshot
 *   [namespace, "loaded", offset]                its end
 *   [namespace, "offset", offset]                nothing has happened up to here
 *   [namespace, "event", name, what, old, offset]
 *   [namespace, "refused", data]
 *
 * Argument: a JSON array of {url, transports, file, switching, cutting, namespaces}; `namespaces` are arrays of
 * options, of which the first is asked for at first and, on each return, with the probability `switching` the
 * next. With `cutting` the client cuts its connection once, when the first rows of a snapshot arrive. Stops when standard
 * input ends.
 */

import { createWriteStream } from 'node:fs';
import { Manager } from 'socket.io-client';

const RECONNECTION = { reconnectionDelay: 200, reconnectionDelayMax: 1000, timeout: 5000 };

// A client may be held because the database is away, which `feed:state` says, or because a look at it takes longer than
// this on the server (HOLD_AFTER_S in app/live/broadcast.py), which nothing says. Timers may be a little early.
const HOLD_AFTER_MS = 390;

function note(socket, write, askedAt, onrows) {
  let isHeld = false;
  let isGreeted = false;
  socket.on('connect', () => {
    isHeld = performance.now() - askedAt() >= HOLD_AFTER_MS;
    isGreeted = false;
  });
  socket.on('connect_error', (error) => {
    if (error.data) write(['refused', error.data]);
  });
  socket.onAny((event, ...args) => {
    if (event === 'feed:state') {
      isHeld ||= !isGreeted;
    } else if (event === 'feed:hello') {
      isGreeted = true;
      write(['hello', args[0].recovered, args[1], isHeld ? null : socket.recovered]);
    } else if (event === 'feed:rows') {
      write(['rows', args[0]]);
      onrows();
    } else if (event === 'feed:loaded' || event === 'feed:offset') {
      write([event.slice('feed:'.length), args[0]]);
    } else {
      const offset = args.pop();
      write(['event', event, args[0] ?? null, args[1] ?? null, offset]);
    }
  });
}

function subscribe({ url, transports, switching, cutting, namespaces }, write) {
  const manager = new Manager(url, { transports, ...RECONNECTION });
  let toCut = cutting;
  const sockets = Object.entries(namespaces).map(([namespace, alternatives]) => {
    let asked = -1;
    let askedAt = 0;
    const auth = (send) => {
      if (asked < 0) asked = 0;
      else if (Math.random() < switching) asked = (asked + 1) % alternatives.length;
      write([namespace, 'ask', asked]);
      askedAt = performance.now();
      send(alternatives[asked]);
    };
    const socket = manager.socket(namespace, { auth });
    const onrows = () => {
      if (!toCut) return;
      toCut = false;
      manager.engine.close();
    };
    note(socket, (entry) => write([namespace, ...entry]), () => askedAt, onrows);
    return socket;
  });
  return {
    stop() {
      for (const socket of sockets) socket.disconnect();
    },
  };
}

const clients = JSON.parse(process.argv[2]).map((options) => {
  const file = createWriteStream(options.file);
  const client = subscribe(options, (entry) => file.write(`${JSON.stringify(entry)}\n`));
  return { client, file };
});
process.stdin.on('end', async () => {
  for (const { client } of clients) client.stop();
  await Promise.all(clients.map(({ file }) => new Promise((done) => file.end(done))));
  process.exit();
});
process.stdin.resume();
