// Both sides of a judged JavaScript program: `candidate` runs the model's code, `checker` the benchmark's test.
// Descriptor 3 and up are pipes; a frame is a 4-byte big-endian length and that much JSON (see wire.py).
// Values cross as plain data only, so nothing the candidate makes can answer a comparison for itself.
"use strict";
const fs = require("node:fs");
const LIMIT = 64 * 2 ** 20;
const JOB_LIMIT = 256 * 2 ** 20;

function readFrame(fd, limit = LIMIT) {
  const header = readExactly(fd, 4);
  if (header === null) return null;
  const size = header.readUInt32BE(0);
  if (size > limit) throw new Error(`a frame of ${size} bytes`);
  const body = readExactly(fd, size);
  return body === null ? null : JSON.parse(body.toString("utf8"));
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
  const body = Buffer.from(JSON.stringify(value), "utf8");
  if (body.length > LIMIT) throw new NotPlain(`a value of ${body.length} bytes`);
  const header = Buffer.alloc(4);
  header.writeUInt32BE(body.length, 0);
  const data = Buffer.concat([header, body]);
  for (let sent = 0; sent < data.length; ) sent += fs.writeSync(fd, data, sent);
}

class NotPlain extends Error {}

function encode(value) {
  if (value === null || typeof value === "boolean" || typeof value === "string") return value;
  if (value === undefined) return { u: 1 };
  if (typeof value === "number") {
    return Number.isFinite(value) && !Object.is(value, -0) ? value : { n: Object.is(value, -0) ? "-0" : String(value) };
  }
  if (typeof value === "bigint") return { b: value.toString() };
  if (typeof value !== "object") throw new NotPlain(`a ${typeof value}, not plain data`);
  if (Array.isArray(value)) return Array.from(value, encode);
  if (value instanceof Map) return { m: Array.from(value, ([key, item]) => [encode(key), encode(item)]) };
  if (value instanceof Set) return { s: Array.from(value, encode) };
  if (value instanceof Date) return { t: Number(value) };
  if (ArrayBuffer.isView(value) || typeof value.then === "function") {
    throw new NotPlain(`a ${value.constructor.name}, not plain data`);
  }
  return { o: Object.keys(value).map((key) => [key, encode(value[key])]) };
}

function decode(node) {
  if (node === null || typeof node !== "object") return node;
  if (Array.isArray(node)) return node.map(decode);
  const [tag, content] = Object.entries(node)[0] ?? [];
  if (tag === "u") return undefined;
  if (tag === "n") return Number(content);
  if (tag === "b") return BigInt(content);
  if (tag === "t") return new Date(content);
  if (tag === "m") return new Map(content.map(([key, item]) => [decode(key), decode(item)]));
  if (tag === "s") return new Set(content.map(decode));
  if (tag === "o") {
    const made = {};
    for (const [key, item] of content) {
      Object.defineProperty(made, String(key), { value: decode(item), enumerable: true, writable: true, configurable: true });
    }
    return made;
  }
  throw new NotPlain("not a value");
}

function describe(error) {
  try {
    return `${error.name}: ${String(error.message).split("\n")[0]}`.slice(0, 300);
  } catch {
    return "an unreadable exception";
  }
}

function serve(calls, replies) {
  writeFrame(replies, { alive: true });
  const job = readFrame(calls, JOB_LIMIT);
  let target;
  try {
    const shared = { exports: {} };
    const load = new Function(
      "require", "module", "exports",
      `${job.program}\n;return typeof ${job.entry_point} === "undefined" ? undefined : ${job.entry_point};`,
    );
    target = load(require, shared, shared.exports);
    if (typeof target !== "function") throw new ReferenceError(`the program does not define ${job.entry_point}`);
  } catch (error) {
    writeFrame(replies, { raised: describe(error) });
    return;
  }
  writeFrame(replies, { ready: true });
  for (let request; (request = readFrame(calls)) !== null; ) {
    let reply;
    try {
      reply = { value: encode(target(...decode(request))) };
    } catch (error) {
      reply = error instanceof NotPlain ? { refused: describe(error) } : { raised: describe(error) };
    }
    try {
      writeFrame(replies, reply);
    } catch (error) {
      writeFrame(replies, { refused: describe(error) });
    }
  }
}

class Lost extends Error {}
class BrokenTest extends Error {}

function judge(job, calls, replies) {
  let count = 0;
  let fault = null;
  const lost = (reason) => new Lost((fault = fault ?? reason));
  const receive = () => {
    let reply;
    try {
      reply = readFrame(replies);
    } catch (error) {
      throw lost("the candidate broke the protocol");
    }
    if (reply === null) throw lost("the candidate's process ended");
    if (typeof reply !== "object") throw lost("the candidate broke the protocol");
    return reply;
  };
  const candidate = (...args) => {
    if (fault !== null) throw new Lost(fault);
    count += 1;
    let request;
    try {
      request = encode(args);
    } catch (error) {
      throw new BrokenTest(`the test passes ${error.message} to the candidate`);
    }
    try {
      writeFrame(calls, request);
    } catch {
      throw lost("the candidate's process ended");
    }
    const reply = receive();
    if ("refused" in reply) throw lost(`returned ${String(reply.refused).slice(0, 200)}`);
    if ("raised" in reply) throw new Error(String(reply.raised).slice(0, 300));
    if (!("value" in reply)) throw lost("the candidate broke the protocol");
    try {
      return decode(reply.value);
    } catch {
      throw lost("the candidate broke the protocol");
    }
  };
  try {
    try {
      receive();
    } catch {
      return ["error", "the candidate's process could not be started"];
    }
    const reply = receive();
    if (reply.ready !== true) throw lost(`while loading, ${String(reply.raised).slice(0, 300)}`);
    new Function("require", job.entry_point, job.test)(require, candidate);
  } catch (error) {
    if (error instanceof BrokenTest) return ["error", error.message];
    if (count === 0 && fault === null) return ["error", `the test failed before it called the candidate: ${describe(error)}`];
    return ["failed", fault ?? describe(error)];
  }
  if (fault !== null) return ["failed", fault];
  return count === 0 ? ["error", "the test never called the candidate"] : ["passed", ""];
}

if (process.argv[1] === "candidate") {
  try {
    serve(3, 4);
  } finally {
    process.exit(0);
  }
} else {
  const job = readFrame(3, JOB_LIMIT);
  let outcome;
  try {
    outcome = judge(job, 4, 5);
  } catch (error) {
    outcome = ["error", `the checker failed: ${describe(error)}`];
  }
  writeFrame(6, outcome);
  process.exit(0);
}
