#![allow(clippy::unwrap_used, clippy::expect_used)]
use super::*;
use proptest::prelude::*;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const END_HEADERS: u8 = 0x4;

/// The symbols that tests use, in the order of their codes: 5 bits from 0, 6 from 0x14, 7 from 0x5c (RFC 7541,
/// appendix B).
const SYMBOLS: [(&str, u32, u32); 6] = [
    ("012aceiost", 5, 0),
    (" %-./3456789=A_bdfghlmnpru", 6, 0x14),
    (":BCDEFGHIJKLMNOPQRSTUVWYjkqvwxyz", 7, 0x5c),
    ("XZ", 8, 0xfc),
    ("+", 11, 0x7fb),
    ("~", 13, 0x1ffd),
];

fn huffman(text: &str) -> Vec<u8> {
    let mut bits: Vec<bool> = Vec::new();
    for c in text.chars() {
        let (_, length, code) = SYMBOLS
            .iter()
            .find_map(|&(symbols, length, first)| {
                symbols.find(c).map(|at| (symbols, length, first + u32::try_from(at).unwrap()))
            })
            .unwrap();
        bits.extend((0..length).rev().map(|bit| code >> bit & 1 == 1));
    }
    bits.resize(bits.len().next_multiple_of(8), true);
    bits.chunks(8).map(|byte| byte.iter().fold(0, |sum, bit| sum << 1 | u8::from(*bit))).collect()
}

fn number(out: &mut Vec<u8>, first: u8, prefix: u32, mut number: usize) {
    let mask = (1 << prefix) - 1;
    if number < mask {
        return out.push(first | u8::try_from(number).unwrap());
    }
    out.push(first | u8::try_from(mask).unwrap());
    number -= mask;
    while number >= 128 {
        out.push(u8::try_from(number % 128).unwrap() | 0x80);
        number /= 128;
    }
    out.push(u8::try_from(number).unwrap());
}

fn string(out: &mut Vec<u8>, coded: bool, text: &str) {
    let (first, bytes) = if coded { (0x80, huffman(text)) } else { (0, text.as_bytes().to_vec()) };
    number(out, first, 7, bytes.len());
    out.extend(bytes);
}

/// How a client writes its `:authority`.
#[derive(Debug, Clone, Copy)]
struct Style {
    /// First bits of the literal: indexed from then on, not indexed, never indexed.
    literal: (u8, u32),
    /// Whether the name is referred to in the static table.
    name_index: bool,
    coded: bool,
    padding: Option<u8>,
    priority: bool,
    /// Bytes in a fragment of the header block.
    fragment: usize,
    table_size: bool,
}

fn style() -> impl Strategy<Value = Style> {
    let literal = prop_oneof![Just((0x40, 6)), Just((0, 4)), Just((0x10, 4))];
    let padding = proptest::option::of(any::<u8>());
    (literal, any::<bool>(), any::<bool>(), padding, any::<bool>(), 1..200_usize, any::<bool>()).prop_map(
        |(literal, name_index, coded, padding, priority, fragment, table_size)| Style {
            literal,
            name_index,
            coded,
            padding,
            priority,
            fragment,
            table_size,
        },
    )
}

fn frame(out: &mut Vec<u8>, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
    out.extend(&u32::try_from(payload.len()).unwrap().to_be_bytes()[1..]);
    out.extend([kind, flags]);
    out.extend(stream.to_be_bytes());
    out.extend(payload);
}

/// A connection on which a client makes a request in each style, all with one authority, path and value of `x-other`.
fn connection(authority: &str, other: &str, styles: &[Style]) -> Vec<u8> {
    let mut out = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    frame(&mut out, 4, 0, 0, &[]);
    let mut table = 0;
    for (i, style) in styles.iter().enumerate() {
        let mut block = Vec::new();
        if style.table_size && i == 0 {
            number(&mut block, 0x20, 5, 4096);
        }
        block.extend([0x83, 0x86]); // POST, http
        if table > 0 {
            number(&mut block, 0x80, 7, 61 + table);
        } else {
            let (first, prefix) = style.literal;
            number(&mut block, first, prefix, usize::from(style.name_index));
            if !style.name_index {
                string(&mut block, style.coded, ":authority");
            }
            string(&mut block, style.coded, authority);
            table += usize::from(first == 0x40);
        }
        block.push(0x04);
        string(&mut block, style.coded, "/a%2Fb");
        block.push(0x10);
        string(&mut block, style.coded, "x-other");
        string(&mut block, style.coded, other);
        let stream = u32::try_from(2 * i + 1).unwrap();
        let fragments: Vec<_> = block.chunks(style.fragment).collect();
        for (n, fragment) in fragments.iter().enumerate() {
            let ends = if n + 1 == fragments.len() { END_HEADERS } else { 0 };
            if n > 0 {
                frame(&mut out, CONTINUATION, ends, stream, fragment);
                continue;
            }
            let (mut payload, mut flags) = (Vec::new(), ends);
            if let Some(padding) = style.padding {
                payload.push(padding);
                flags |= PADDED;
            }
            if style.priority {
                payload.extend([0, 0, 0, 0, 15]);
                flags |= PRIORITY;
            }
            payload.extend(*fragment);
            payload.extend(vec![0x41; usize::from(style.padding.unwrap_or(0))]);
            frame(&mut out, HEADERS, flags, stream, &payload);
        }
        frame(&mut out, 0, 1, stream, b"A\x0a:authority\x02%%");
    }
    out
}

fn passed(bytes: &[u8], cuts: &[usize]) -> Vec<u8> {
    let (mut frames, mut bytes) = (Frames::new(), bytes.to_vec());
    let mut rest = bytes.as_mut_slice();
    for cut in cuts.iter().cycle() {
        if rest.is_empty() {
            break;
        }
        let (fresh, later) = rest.split_at_mut((*cut).clamp(1, rest.len()));
        frames.pass(fresh);
        rest = later;
    }
    bytes
}

/// Authority, path and `x-other` of each request as `h2` takes them, or why it does not.
async fn judged_by_h2(bytes: Vec<u8>, requests: usize) -> Result<Vec<(String, String, String)>, h2::Error> {
    let (mut client, server) = tokio::io::duplex(1 << 20);
    client.write_all(&bytes).await.unwrap();
    let mut connection = h2::server::handshake(Adapter::new(server)).await?;
    let mut seen = Vec::new();
    while seen.len() < requests {
        let (request, answer) = connection.accept().await.unwrap()?;
        let uri = request.uri();
        let other = request.headers()["x-other"].to_str().unwrap().to_owned();
        seen.push((uri.authority().unwrap().to_string(), uri.path().to_owned(), other));
        drop(answer);
    }
    Ok(seen)
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    runtime.block_on(async { tokio::time::timeout(Duration::from_secs(5), future).await.expect("h2 waits for more") })
}

const PATH: &str = "[a-zA-Z0-9%/_.~+-]{0,60}";

proptest! {
    #[test]
    fn h2_takes_what_a_client_sends(
        authority in "[a-z0-9][a-zA-Z0-9%_.~+-]{0,300}",
        other in PATH,
        styles in proptest::collection::vec(style(), 1..6),
    ) {
        let bytes = connection(&authority, &other, &styles);
        let seen = block_on(judged_by_h2(bytes, styles.len())).unwrap();
        let mended = (authority.replace('%', "."), "/a%2Fb".to_owned(), other);
        prop_assert_eq!(seen, vec![mended; styles.len()]);
    }

    #[test]
    fn what_needs_no_change_passes_byte_for_byte(
        authority in "[a-zA-Z0-9_.:~+-]{0,300}",
        other in PATH,
        styles in proptest::collection::vec(style(), 1..6),
        cuts in proptest::collection::vec(1..2000_usize, 1..20),
    ) {
        let bytes = connection(&authority, &other, &styles);
        prop_assert_eq!(passed(&bytes, &cuts), bytes);
    }

    #[test]
    fn cuts_do_not_matter(
        authority in "[a-zA-Z0-9%_.~+-]{0,100}",
        other in PATH,
        styles in proptest::collection::vec(style(), 1..4),
        cuts in proptest::collection::vec(1..40_usize, 1..20),
        broken in proptest::option::of((any::<prop::sample::Index>(), any::<u8>())),
    ) {
        let mut bytes = connection(&authority, &other, &styles);
        if let Some((at, byte)) = broken {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        let whole = passed(&bytes, &[usize::MAX]);
        prop_assert_eq!(whole.len(), bytes.len());
        prop_assert_eq!(&passed(&bytes, &[1]), &whole);
        prop_assert_eq!(&passed(&bytes, &cuts), &whole);
    }

    #[test]
    fn anything_may_come(noise in proptest::collection::vec(any::<u8>(), 0..2000), kind in 0..10_u8) {
        let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
        frame(&mut bytes, kind, noise.first().copied().unwrap_or(0), 1, &noise);
        bytes.extend(&noise);
        prop_assert_eq!(passed(&bytes, &[usize::MAX]), passed(&bytes, &[1]));
    }
}

/// The reason for all this; when it fails, `h2` has learned it, and this module can go.
#[test]
fn h2_alone_still_refuses() {
    let style = Style {
        literal: (0x40, 6),
        name_index: false,
        coded: false,
        padding: None,
        priority: false,
        fragment: 16_384,
        table_size: false,
    };
    let bytes = connection("run%2Fagent.sock", "", &[style]);
    let reset = [0, 0, 4, 3, 0, 0, 0, 0, 1, 0, 0, 0, 1]; // RST_STREAM, stream 1, PROTOCOL_ERROR
    block_on(async {
        let (mut client, server) = tokio::io::duplex(1 << 20);
        client.write_all(&bytes).await.unwrap();
        let mut connection = h2::server::handshake(server).await.unwrap();
        let mut answer = Vec::new();
        while !answer.windows(reset.len()).any(|window| window == reset) {
            tokio::select! {
                accepted = connection.accept() => panic!("not reset but {accepted:?}"),
                read = client.read_buf(&mut answer) => assert!(read.unwrap() > 0, "{answer:x?}"),
            }
        }
    });
    assert_eq!(block_on(judged_by_h2(bytes, 1)).unwrap()[0].0, "run.2Fagent.sock");
}

#[test]
fn the_name_is_coded_as_the_code_says() {
    let mut coded = Vec::new();
    string(&mut coded, true, ":authority");
    assert_eq!(coded, [0x88, 0xb8, 0x3b, 0x53, 0x39, 0xec, 0x32, 0x7d, 0x7f]);
}
