/** What the page says about its connection: a few words for the top line, and a sentence for the notice. */

const SOON_MS = 2_000;
const clock = new Intl.DateTimeFormat(undefined, { timeStyle: 'medium', hourCycle: 'h23' });
const day = new Intl.DateTimeFormat(undefined, { dateStyle: 'medium', timeStyle: 'medium', hourCycle: 'h23' });
const number = new Intl.NumberFormat();
const opened = new Date();

export const counted = (count, noun) => `${number.format(count)} ${count === 1 ? noun : `${noun}s`}`;

/** A few words for a state of the feed. `wasLive`: it has been live before. */
export function wordsFor({ name, problem, since, asOf, missed, reloaded }, wasLive) {
  if (name === 'stale') return asOf ? `Database away since ${timeOf(since)}` : 'Waiting for the database';
  if (name === 'returning') return 'Catching up';
  if (problem?.status === 503) return 'Waiting for the server';
  if (problem) return 'Refused by the server';
  if (name === 'loading') return 'Loading';
  if (name === 'connecting') return wasLive ? 'Reconnecting' : 'Connecting';
  if (reloaded) return 'Live again, list reloaded';
  return missed > 0 ? `Live, caught up ${counted(missed, 'change')}` : 'Live';
}

/** A sentence on why the rows may not be up to date, or ''. */
export function sentenceFor({ name, problem, since, reason, asOf }) {
  const rows = asOf ? `; rows as of ${timeOf(asOf)}` : '';
  if (name === 'stale' && !asOf) return `${sentence(reason)} The list will load as soon as it is back.`;
  if (name === 'stale') return `The database has been away since ${timeOf(since)}${rows}. ${sentence(reason)}`;
  if (problem) return `${sentence(problem.message)} This page keeps asking${rows}.`;
  // A moment without a connection is not worth mentioning.
  if (name === 'connecting' && Date.now() - (asOf ?? opened) > SOON_MS) return `There is no connection to the server${rows}.`;
  return '';
}

/** Engine.IO's reasons, and those of proxies, may lack a full stop. */
const sentence = (text) => (/[.!?]$/.test(text) ? text : `${text}.`);

function timeOf(time) {
  return (time.toDateString() === new Date().toDateString() ? clock : day).format(time);
}
