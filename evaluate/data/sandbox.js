// Both sides of a judged JavaScript program: `candidate` runs the model's code, `checker` the benchmark's test.
// Descriptor 3 and up are pipes; a frame is a 4-byte big-endian length and that much JSON.
// Values cross as plain data only, so nothing the candidate makes can answer a comparison for itself. What is not plain
// (a function, an iterator) stays where it is and is called over the pipe, both ways.
"use strict";
const fs = require("node:fs");
const util = require("node:util").types;
const LIMIT = 64 * 2 ** 20;
const JOB_LIMIT = 256 * 2 ** 20;
const ERRORS = { Error, TypeError, RangeError, SyntaxError, ReferenceError, EvalError, URIError };
const ARRAYS = { Int8Array, Uint8Array, Uint8ClampedArray, Int16Array, Uint16Array, Int32Array, Uint32Array,
  Float32Array, Float64Array, BigInt64Array, BigUint64Array, Buffer };
// Held here: the program may replace what it finds.
const { stringify, parse } = JSON;

class NotPlain extends Error {}
class Lost extends Error {}
class BrokenTest extends Error {}

function readFrame(fd, limit = LIMIT) {
  const header = readExactly(fd, 4);
  if (header === null) return null;
  const size = header.readUInt32BE(0);
  if (size > limit) throw new NotPlain(`a frame of ${size} bytes (limit ${limit})`);
  const body = readExactly(fd, size);
  return body === null ? null : parse(body.toString("utf8"));
}

function readExactly(fd, size) {
  const buffer = Buffer.alloc(size);
  for (let got = 0; got < size; ) {
    const count = fs.readSync(fd, buffer, got, size - got, null);
    if (count === 0) return null;
    got += count;
  }
  return buffer;
}

function writeFrame(fd, value) {
  const body = Buffer.from(stringify(value), "utf8");
  if (body.length > LIMIT) throw new NotPlain(`a value of ${body.length} bytes (limit ${LIMIT})`);
  const header = Buffer.alloc(4);
  header.writeUInt32BE(body.length, 0);
  const data = Buffer.concat([header, body]);
  for (let sent = 0; sent < data.length; ) sent += fs.writeSync(fd, data, sent);
}

// One message's values. `seen` holds the objects in the order they were met, on both sides alike.
class Writer {
  constructor(line, known = []) {
    this.line = line;
    this.seen = [...known];
    this.numbers = new Map(this.seen.map((value, number) => [value, number]));
  }

  node(value) {
    if (value === null || typeof value === "boolean" || typeof value === "string") return value;
    if (value === undefined) return { u: 1 };
    if (typeof value === "number") {
      return Number.isFinite(value) && !Object.is(value, -0) ? value : { n: Object.is(value, -0) ? "-0" : String(value) };
    }
    if (typeof value === "bigint") return { b: value.toString() };
    if (typeof value === "function") return this.line.spell(value);
    if (typeof value !== "object") throw new NotPlain(`a ${typeof value}, not plain data`);
    if (this.numbers.has(value)) return { "@": this.numbers.get(value) };
    this.numbers.set(value, this.seen.length);
    this.seen.push(value);
    return this.content(value);
  }

  content(value) {
    if (Array.isArray(value)) {
      const extra = Object.keys(value).filter((key) => !/^\d+$/.test(key));
      const items = Array.from(value, (item) => this.node(item));
      return extra.length ? { l: [items, extra.map((key) => [key, this.node(value[key])])] } : items;
    }
    if (util.isMap(value)) return { m: Array.from(value, ([key, item]) => [this.node(key), this.node(item)]) };
    if (util.isSet(value)) return { s: Array.from(value, (item) => this.node(item)) };
    if (util.isDate(value)) return { t: Number(value) };
    if (util.isRegExp(value)) return { x: [value.source, value.flags, value.lastIndex] };
    if (util.isNativeError(value) || value instanceof Error) return { e: this.error(value) };
    if (ArrayBuffer.isView(value)) return this.array(value);
    if (util.isBoxedPrimitive(value)) throw new NotPlain(`a boxed ${typeof value.valueOf()}, not plain data`);
    if (typeof value.next === "function" && typeof value[Symbol.iterator] === "function") return this.line.spell(value);
    if (typeof value.then === "function") throw new NotPlain("a Promise, not plain data");
    const name = Object.getPrototypeOf(value) === null ? null : value.constructor?.name;
    const own = Object.keys(value).map((key) => [key, this.node(value[key])]);
    return { o: [own, name === null ? null : "", ...this.methods(value)] };
  }

  // An instance of a class: its methods and accessors are called where it is.
  methods(value) {
    const names = [];
    let kind = Object.getPrototypeOf(value);
    for (; kind !== null && Object.getPrototypeOf(kind) !== null; kind = Object.getPrototypeOf(kind)) {
      names.push(...Object.getOwnPropertyNames(kind).filter((name) => name !== "constructor"));
    }
    return names.length && this.line.keep ? [this.line.keep(value), [...new Set(names)]] : [];
  }

  array(value) {
    const name = Object.keys(ARRAYS).find((each) => value.constructor === ARRAYS[each]);
    if (name === undefined) throw new NotPlain(`a ${value.constructor.name}, not plain data`);
    return { a: [name, Array.from(value, (item) => this.node(item))] };
  }

  error(value) {
    let name = "Error";
    for (const each of Object.keys(ERRORS)) if (each !== "Error" && value instanceof ERRORS[each]) name = each;
    const own = Object.keys(value).map((key) => [key, this.node(value[key])]);
    if ("cause" in value) own.push(["cause", this.node(value.cause)]);
    return [name, String(value.name), String(value.message), own, String(value.constructor?.name ?? "Error")];
  }
}

class Reader {
  constructor(line, known = []) {
    this.line = line;
    this.seen = [...known];
  }

  value(node) {
    if (node === null || typeof node !== "object") return node;
    if (Array.isArray(node)) return this.fill(this.met([]), node);
    const [tag, content] = Object.entries(node)[0] ?? [];
    if (tag === "u") return undefined;
    if (tag === "n") return Number(content);
    if (tag === "b") return BigInt(content);
    if (tag === "f") return this.line.make(content);
    if (tag === "@" && content >= 0 && content < this.seen.length) return this.seen[content];
    if (tag === "l") return this.fill(this.met([]), node);
    if (tag === "m") return this.fill(this.met(new Map()), node);
    if (tag === "s") return this.fill(this.met(new Set()), node);
    if (tag === "o") return this.fill(this.met(this.instance(content)), node);
    if (tag === "e") return this.fill(this.met(this.error(content)), node);
    if (tag === "t") return this.met(new Date(content));
    if (tag === "x") return this.met(Object.assign(new RegExp(content[0], content[1]), { lastIndex: content[2] }));
    if (tag === "a") {
      const made = this.met(ARRAYS[content[0]].from([]));
      const whole = ARRAYS[content[0]].from(content[1].map((item) => this.value(item)));
      this.seen[this.seen.indexOf(made)] = whole;
      return whole;
    }
    if (tag === "i") return this.met(this.line.make(content));
    throw new NotPlain("not a value");
  }

  met(value) {
    this.seen.push(value);
    return value;
  }

  // Give an object the content of a node; also one that was there before.
  fill(made, node) {
    const put = (key, item) =>
      Object.defineProperty(made, String(key), { value: item, enumerable: true, writable: true, configurable: true });
    if (Array.isArray(node)) {
      made.length = 0;
      for (const item of node) made.push(this.value(item));
      return made;
    }
    const [tag, content] = Object.entries(node)[0] ?? [];
    if (tag === "l" && Array.isArray(made)) {
      this.fill(made, content[0]);
      for (const [key, item] of content[1]) put(key, this.value(item));
    } else if (tag === "m" && util.isMap(made)) {
      made.clear();
      for (const [key, item] of content) made.set(this.value(key), this.value(item));
    } else if (tag === "s" && util.isSet(made)) {
      made.clear();
      for (const item of content) made.add(this.value(item));
    } else if (tag === "o" || tag === "e") {
      const own = tag === "o" ? content[0] : content[3];
      if (tag === "o") for (const key of Object.keys(made)) if (!own.some(([name]) => name === key)) delete made[key];
      for (const [key, item] of own) put(key, this.value(item));
    } else if (tag === "a" && ArrayBuffer.isView(made)) {
      content[1].forEach((item, at) => (made[at] = this.value(item)));
    } else if (tag === "t" && util.isDate(made)) {
      made.setTime(content);
    } else if (tag !== "x" && tag !== "i") {
      throw new NotPlain("not a value (another kind of object)");
    }
    return made;
  }

  instance([, name, handle, methods]) {
    if (methods === undefined) return name === null ? Object.create(null) : {};
    const kind = {};
    for (const method of methods) {
      const ask = (...args) => this.line.ask("method", handle, [method, ...args]);
      Object.defineProperty(kind, String(method), { value: ask, writable: true, configurable: true });
    }
    return Object.create(kind);
  }

  error([kind, name, message, , own]) {
    const base = Object.hasOwn(ERRORS, kind) ? ERRORS[kind] : Error;
    const made = new base(message);
    if (own !== kind) {
      const derived = { [own]: class extends base {} }[own];
      Object.setPrototypeOf(made, derived.prototype);
    }
    if (made.name !== name) Object.defineProperty(made, "name", { value: name, writable: true, configurable: true });
    return made;
  }
}

// One side of the pipe: ["do", what, handle, args], answered by ["is" | "raised", value, changed] or ["refused", why].
class Line {
  constructor(incoming, outgoing) {
    Object.assign(this, { incoming, outgoing, kept: [], handles: new Map(), theirs: new Map() });
  }

  spell(value) {
    if (this.homes?.has(value)) return { f: ["home", this.homes.get(value)] };
    const node = ["kept", this.keepOne(value)];
    return typeof value === "function" ? { f: node } : { i: ["iterator", node[1]] };
  }

  keepOne(value) {
    if (!this.handles.has(value)) {
      this.handles.set(value, this.kept.length);
      this.kept.push(value);
    }
    return this.handles.get(value);
  }

  make([tag, handle]) {
    if (tag === "home" && Number.isInteger(handle) && handle in this.kept) return this.kept[handle];
    if (tag === "iterator") {
      const line = this;
      return { next: (value) => line.ask("next", handle, [value]), [Symbol.iterator]() { return this; } };
    }
    if (tag !== "kept") throw new NotPlain("not a value (unknown handle)");
    if (!this.theirs.has(handle)) {
      const made = (...args) => this.ask("call", handle, args);
      this.theirs.set(handle, made);
      this.homes = (this.homes ?? new Map()).set(made, handle);
    }
    return this.theirs.get(handle);
  }

  ask(what, handle, args) {
    const writer = new Writer(this);
    this.send(["do", what, handle, writer.node(args)]);
    for (;;) {
      const said = this.receive();
      if (said[0] === "do") {
        this.answer(said);
        continue;
      }
      if (said[0] === "refused") throw this.lost(`returned ${String(said[1]).slice(0, 200)}`);
      return this.take(said, new Reader(this, writer.seen));
    }
  }

  take(said, reader) {
    let value;
    try {
      value = reader.value(said[1]);
      for (const [number, node] of said[2]) reader.fill(reader.seen[number], node);
    } catch (error) {
      throw error instanceof Lost ? error : this.lost("the candidate broke the protocol");
    }
    if (said[0] === "raised") throw value;
    if (said[0] === "promised") return Promise.resolve(value);
    if (said[0] === "broken") return Promise.reject(value);
    return value;
  }

  answer([, what, handle, node]) {
    const reader = new Reader(this);
    const args = reader.value(node);
    const before = reader.seen.map((value) => this.spelt(value, reader.seen));
    let said;
    try {
      said = ["is", this.perform(what, handle, args)];
    } catch (error) {
      if (error instanceof Lost) throw error;
      said = ["raised", error];
    }
    const reply = (kind, value) => {
      try {
        const writer = new Writer(this, reader.seen);
        const made = writer.node(value);
        const changed = [];
        reader.seen.forEach((old, number) => {
          if (this.spelt(old, reader.seen) !== before[number]) changed.push([number, writer.content(old)]);
        });
        this.send([kind, made, changed]);
      } catch (error) {
        this.send(["refused", error instanceof NotPlain ? error.message : describe(error)]);
      }
    };
    if (said[0] === "is" && util.isPromise(said[1])) {
      return said[1].then((value) => reply("promised", value), (error) => reply("broken", error));
    }
    reply(said[0], said[1]);
    return undefined;
  }

  // What an object holds now, to see whether it was changed: objects in it by number.
  spelt(value, known) {
    try {
      return stringify(new Writer({ spell: () => ({ f: 0 }) }, known).content(value));
    } catch {
      return "";
    }
  }

  send(value) {
    try {
      writeFrame(this.outgoing, value);
    } catch (error) {
      if (error instanceof NotPlain) throw error;
      throw this.lost("the candidate's process ended");
    }
  }

  receive() {
    let said;
    try {
      said = readFrame(this.incoming);
    } catch (error) {
      throw this.lost("the candidate broke the protocol");
    }
    if (said === null) throw this.lost("the candidate's process ended");
    const known = ["do", "is", "raised", "refused", "promised", "broken"];
    if (!Array.isArray(said) || !known.includes(said[0])) throw this.lost("the candidate broke the protocol");
    if (said[0] !== "refused" && said[0] !== "do" && !Array.isArray(said[2])) {
      throw this.lost("the candidate broke the protocol");
    }
    return said;
  }

  lost(reason) {
    return new Lost(reason);
  }
}

function describe(error) {
  try {
    return `${error.name}: ${String(error.message).split("\n")[0]}`.slice(0, 300);
  } catch {
    return "an unreadable exception";
  }
}

class ProgramSide extends Line {
  keep(value) {
    return this.keepOne(value);
  }

  perform(what, handle, args) {
    const value = this.kept[handle];
    if (what === "call") return value(...args);
    if (what === "new") return new value(...args);
    if (what === "next") return value.next(...args);
    if (what === "method") {
      const [name, ...rest] = args;
      return typeof value[name] === "function" ? value[name](...rest) : value[name];
    }
    throw new NotPlain("not something to ask for");
  }
}

class TestSide extends Line {
  fault = null;
  count = 0;

  ask(what, handle, args) {
    if (this.fault !== null) throw new Lost(this.fault);
    if (what !== "next") this.count += 1;
    try {
      return super.ask(what, handle, args);
    } catch (error) {
      throw error instanceof NotPlain ? new BrokenTest(`the test passes ${error.message} to the candidate`) : error;
    }
  }

  perform(what, handle, args) {
    const value = Number.isInteger(handle) ? this.kept[handle] : undefined;
    if (what === "call" && typeof value === "function" && Array.isArray(args)) return value(...args);
    if (what === "next" && typeof value?.next === "function") return value.next(...args);
    throw this.lost("the candidate broke the protocol");
  }

  lost(reason) {
    return new Lost((this.fault = this.fault ?? reason));
  }
}

async function serve(calls, replies) {
  const line = new ProgramSide(calls, replies);
  writeFrame(replies, "alive");
  const job = readFrame(calls, JOB_LIMIT);
  process.argv.splice(2);
  process.argv[1] = "candidate.js";
  let target;
  try {
    const shared = { exports: {} };
    const load = new Function(
      "require", "module", "exports",
      `${job.program}\n;return typeof ${job.entry_point} === "undefined" ? module.exports?.${job.entry_point} : ${job.entry_point};`,
    );
    target = load(require, shared, shared.exports);
    if (typeof target !== "function") throw new ReferenceError(`the program does not define ${job.entry_point}`);
  } catch (error) {
    writeFrame(replies, `while loading, ${describe(error)}`);
    return;
  }
  line.keepOne(target);
  writeFrame(replies, "ready");
  for (let request; (request = readFrame(calls)) !== null; ) await line.answer(request);
}

async function judge(job, calls, replies) {
  const line = new TestSide(replies, calls);
  const candidate = new Proxy(function () {}, {
    apply: (target, self, args) => line.ask("call", 0, args),
    construct: (target, args) => line.ask("new", 0, args),
  });
  const word = () => {
    const said = readFrame(replies);
    return typeof said === "string" ? said : null;
  };
  let broken = null;
  const fail = (error) => (broken = broken ?? error);
  process.on("uncaughtException", fail);
  process.on("unhandledRejection", fail);
  try {
    try {
      if (word() !== "alive") throw new Error();
    } catch {
      return ["error", "the candidate's process could not be started"];
    }
    let said = null;
    try {
      said = word();
    } catch {}
    if (said === null) throw line.lost("the candidate's process ended");
    if (said !== "ready") throw line.lost(said.slice(0, 300));
    await run(job, candidate);
    // What a test that waits for promises still has to do.
    await new Promise((resolve) => process.once("beforeExit", resolve));
    if (broken !== null) throw broken;
  } catch (error) {
    if (error instanceof BrokenTest) return ["unjudged", error.message];
    if (line.count === 0 && line.fault === null) {
      return ["unjudged", `the test failed before it called the candidate: ${describe(error)}`];
    }
    return ["failed", line.fault ?? describe(error)];
  }
  if (line.fault !== null) return ["failed", line.fault];
  return line.count === 0 ? ["unjudged", "the test never called the candidate"] : ["passed", ""];
}

function run(job, candidate) {
  let test;
  try {
    test = new Function("require", job.entry_point, job.test);
  } catch {
    // One that waits at its top.
    const AsyncFunction = (async () => {}).constructor;
    test = new AsyncFunction("require", job.entry_point, job.test);
  }
  return test(require, candidate);
}

if (process.argv[1] === "candidate") {
  serve(3, 4).then(() => process.exit(0), () => process.exit(0));
} else {
  const job = readFrame(3, JOB_LIMIT);
  judge(job, 4, 5)
    .catch((error) => ["error", `the checker failed: ${describe(error)}`])
    .then((outcome) => {
      writeFrame(6, outcome);
      process.exit(0);
    });
}
