/**
 * A plain io(url): prints every event and every connection as a JSON line, with the offset the client would resume at.
 *
 * Arguments: URL, JSON array of transports. Ends with standard input.
 */

import { io } from 'socket.io-client';

const [url, transports] = process.argv.slice(2);
const socket = io(url, { transports: JSON.parse(transports), reconnectionDelay: 200 });
const print = (...entry) => process.stdout.write(`${JSON.stringify(entry)}\n`);
socket.on('connect', () => print('connect', socket.recovered));
socket.on('disconnect', (reason) => print('disconnect', reason));
socket.onAny((event, ...args) => print(event, ...args));
process.stdin.on('end', () => process.exit()).resume();
