// The usual Node.js stack: Express for the REST part, Socket.IO for the pages, and pg, whose
// notifications (one per row, with the row as payload) are emitted to all clients.
// Tuned as the Socket.IO and ws documentation advise. Environment: PORT, PGHOST, PGDATABASE, PGUSER.
'use strict';

const { createServer } = require('node:http');
const express = require('express');
const pg = require('pg');
const { Server } = require('socket.io');

const POOL_SIZE = 10;
const EVENTS = { INSERT: 'thing:create', UPDATE: 'thing:update', DELETE: 'thing:destroy' };

pg.types.setTypeParser(pg.types.builtins.INT8, Number);
const pool = new pg.Pool({ max: POOL_SIZE });

const app = express();
app.disable('x-powered-by');
app.disable('etag');
app.use(express.json());

app.get('/api/things', async (request, response) => {
  const { rows } = await pool.query({
    name: 'list',
    text: 'SELECT id, name, info, created_at FROM things ORDER BY id',
  });
  response.json(rows);
});

app.get('/api/things/:name', async (request, response) => {
  const { rows } = await pool.query({
    name: 'one',
    text: 'SELECT id, name, info, created_at FROM things WHERE name = $1',
    values: [request.params.name],
  });
  if (rows.length === 0) response.status(404).json({ title: 'No such thing' });
  else response.json(rows[0]);
});

app.post('/api/things', async (request, response) => {
  const { name, info = '' } = request.body;
  if (typeof name !== 'string' || name.length < 1 || name.length > 200 || typeof info !== 'string') {
    response.status(422).json({ title: 'A thing needs a name of 1 to 200 characters' });
    return;
  }
  try {
    const { rows } = await pool.query({
      name: 'create',
      text: 'INSERT INTO things (name, info) VALUES ($1, $2) RETURNING id, name, info, created_at',
      values: [name, info],
    });
    response.status(201).location(`/api/things/${encodeURIComponent(name)}`).json(rows[0]);
  } catch (error) {
    if (error.code !== '23505') throw error;
    response.status(409).json({ title: 'The name is taken' });
  }
});

const server = createServer(app);
const io = new Server(server, {
  transports: ['websocket'],
  perMessageDeflate: false,
  httpCompression: false,
  serveClient: false,
});
// Saves memory: the first request of each client is no longer needed.
io.engine.on('connection', (socket) => {
  socket.request = null;
});

async function main() {
  const listener = new pg.Client();
  listener.on('notification', ({ payload }) => {
    const { op, row } = JSON.parse(payload);
    io.emit(EVENTS[op], row);
  });
  await listener.connect();
  await listener.query('LISTEN things');
  server.listen({ port: Number(process.env.PORT), host: '127.0.0.1', backlog: 4096 });
}

main();
