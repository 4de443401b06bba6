/**
 * Shows the component Orders of a file of JSX without a browser, in React's strict mode, which mounts everything twice:
 * prints the class of its list and its items, or `refused:` and the text of its paragraph, whenever these have changed.
 * Another one, of all orders, is on the same page and keeps the connection open.
 *
 * Argument: the file. Every line on standard input is another `where`.
 */

import { readFileSync, writeFileSync } from 'node:fs';
import { createInterface } from 'node:readline';
import { StrictMode, createElement } from 'react';
import { create } from 'react-test-renderer';
import ts from 'typescript';

const compilerOptions = { jsx: ts.JsxEmit.ReactJSX, module: ts.ModuleKind.ESNext, target: ts.ScriptTarget.ES2022 };
const { outputText } = ts.transpileModule(readFileSync(process.argv[2], 'utf8'), { compilerOptions });
writeFileSync('Orders.mjs', outputText);
const { Orders } = await import(`${process.cwd()}/Orders.mjs`);

const show = (where) => createElement(StrictMode, null, createElement(Orders, { where }));
create(show());
const renderer = create(null);
let printed;
setInterval(() => {
  const shown = renderer.toJSON();
  if (!shown) return;
  const text = (node) => node.children?.join('') ?? '';
  const list = shown.type === 'ul';
  const line = list ? `${shown.props.className}: ${(shown.children ?? []).map(text).join(', ')}` : `refused: ${text(shown)}`;
  if (line !== printed) console.log(line);
  printed = line;
}, 20);
createInterface({ input: process.stdin }).on('line', (where) => {
  renderer.update(show(where));
});
