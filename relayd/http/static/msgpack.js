// The part of msgpack that the protocol uses (docs/protocol.md §3): no extensions, string keys only.

const utf8 = new TextEncoder();
const fromUtf8 = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });
const MAX_DEPTH = 16;

/** Encode a value: whole numbers as integers, Uint8Array as bin; keys with undefined values are left out. */
export function encode(value) {
  let bytes = new Uint8Array(1024);
  let view = new DataView(bytes.buffer);
  let end = 0;
  const room = (count) => {
    const at = end;
    end += count;
    if (end > bytes.length) {
      const more = new Uint8Array(Math.max(end, 2 * bytes.length));
      more.set(bytes);
      bytes = more;
      view = new DataView(bytes.buffer);
    }
    return at;
  };
  const number = (kind, width, n) => {
    const at = room(width); // first, because it may replace the view
    view[`set${kind}`](at, n);
  };
  const byte = (tag) => number("Uint8", 1, tag);
  const raw = (data) => {
    const at = room(data.length);
    bytes.set(data, at);
  };
  const put = { // writes a tag and a number of this size in bytes
    1: (n) => number("Uint8", 1, n),
    2: (n) => number("Uint16", 2, n),
    4: (n) => number("Uint32", 4, n),
  };
  const sized = (count, fixed, most, tags) => { // writes the head of a string, binary, array or map
    if (count <= most) return byte(fixed | count);
    const size = count < 0x100 && tags[1] ? 1 : count < 0x10000 ? 2 : 4;
    byte(tags[size]);
    return put[size](count);
  };
  const integer = (n) => {
    if (n >= 0 && n < 0x80) return byte(n);
    if (n < 0 && n >= -0x20) return byte(n + 0x100);
    if (n >= 0 && n < 0x100000000) {
      const size = n < 0x100 ? 1 : n < 0x10000 ? 2 : 4;
      byte({ 1: 0xcc, 2: 0xcd, 4: 0xce }[size]);
      return put[size](n);
    }
    if (n < 0 && n >= -0x80000000) {
      const size = n >= -0x80 ? 1 : n >= -0x8000 ? 2 : 4;
      byte({ 1: 0xd0, 2: 0xd1, 4: 0xd2 }[size]);
      return number(`Int${8 * size}`, size, n);
    }
    byte(n < 0 ? 0xd3 : 0xcf);
    return number("BigInt64", 8, BigInt(n));
  };
  const any = (v) => {
    if (v === null) byte(0xc0);
    else if (typeof v === "boolean") byte(v ? 0xc3 : 0xc2);
    else if (Number.isSafeInteger(v)) integer(v);
    else if (typeof v === "number") {
      byte(0xcb);
      number("Float64", 8, v);
    } else if (typeof v === "string") {
      const data = utf8.encode(v);
      sized(data.length, 0xa0, 31, { 1: 0xd9, 2: 0xda, 4: 0xdb });
      raw(data);
    } else if (v instanceof Uint8Array) {
      sized(v.length, 0, -1, { 1: 0xc4, 2: 0xc5, 4: 0xc6 });
      raw(v);
    } else if (Array.isArray(v)) {
      sized(v.length, 0x90, 15, { 2: 0xdc, 4: 0xdd });
      v.forEach(any);
    } else if (typeof v === "object") {
      const pairs = Object.entries(v).filter(([, item]) => item !== undefined);
      sized(pairs.length, 0x80, 15, { 2: 0xde, 4: 0xdf });
      for (const [key, item] of pairs) {
        any(key);
        any(item);
      }
    } else throw new TypeError(`${typeof v} has no place in msgpack`);
  };
  any(value);
  return bytes.slice(0, end);
}

/** Decode all of `data`. Binaries are views into it: slice them to keep or align them. */
export function decode(data) {
  const view = new DataView(data.buffer, data.byteOffset, data.byteLength);
  let end = 0;
  const take = (count) => {
    const at = end;
    end += count;
    if (end > data.length) throw new RangeError("msgpack that ends too early");
    return at;
  };
  const bin = (count) => data.subarray(take(count), end);
  const size = { 1: () => view.getUint8(take(1)), 2: () => view.getUint16(take(2)), 4: () => view.getUint32(take(4)) };
  const string = (count) => fromUtf8.decode(bin(count));
  const array = (count, depth) => {
    const items = [];
    while (items.length < count) items.push(any(depth + 1));
    return items;
  };
  const map = (count, depth) => {
    const pairs = Object.create(null); // without a prototype, so that no key is special
    for (let i = 0; i < count; i++) {
      const key = any(depth + 1);
      if (typeof key !== "string") throw new TypeError("a msgpack key that is no string");
      pairs[key] = any(depth + 1);
    }
    return pairs;
  };
  const any = (depth) => {
    if (depth > MAX_DEPTH + 1) throw new RangeError("msgpack that nests too deep");
    const tag = view.getUint8(take(1));
    if (tag < 0x80) return tag;
    if (tag < 0x90) return map(tag & 15, depth);
    if (tag < 0xa0) return array(tag & 15, depth);
    if (tag < 0xc0) return string(tag & 31);
    if (tag >= 0xe0) return tag - 0x100;
    switch (tag) {
      case 0xc0: return null;
      case 0xc2: return false;
      case 0xc3: return true;
      case 0xc4: return bin(size[1]());
      case 0xc5: return bin(size[2]());
      case 0xc6: return bin(size[4]());
      case 0xca: return view.getFloat32(take(4));
      case 0xcb: return view.getFloat64(take(8));
      case 0xcc: return size[1]();
      case 0xcd: return size[2]();
      case 0xce: return size[4]();
      case 0xcf: return Number(view.getBigUint64(take(8)));
      case 0xd0: return view.getInt8(take(1));
      case 0xd1: return view.getInt16(take(2));
      case 0xd2: return view.getInt32(take(4));
      case 0xd3: return Number(view.getBigInt64(take(8)));
      case 0xd9: return string(size[1]());
      case 0xda: return string(size[2]());
      case 0xdb: return string(size[4]());
      case 0xdc: return array(size[2](), depth);
      case 0xdd: return array(size[4](), depth);
      case 0xde: return map(size[2](), depth);
      case 0xdf: return map(size[4](), depth);
      default: throw new TypeError(`msgpack with the tag ${tag}`); // extensions are not supported
    }
  };
  const value = any(1);
  if (end !== data.length) throw new RangeError("msgpack with something behind it");
  return value;
}
