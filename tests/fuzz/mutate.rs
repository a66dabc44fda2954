//! Small changes, as libFuzzer makes them; always the same for a seed.

use fastrand::Rng;

/// No input is longer, in bytes.
const LONGEST: usize = 16 << 10;
/// Where counters, lengths and signs turn.
const ODD: [u8; 10] = [0, 1, 9, 10, 32, 127, 128, 192, 254, 255];

/// One of the `corpus`, changed in a few places.
pub(crate) fn mutated(corpus: &[Vec<u8>], random: &mut Rng) -> Vec<u8> {
    let mut bytes = any(corpus, random).to_vec();
    for _ in 0..random.usize(1..5) {
        change(&mut bytes, corpus, random);
    }
    bytes.truncate(LONGEST);
    bytes
}

fn any<'a>(corpus: &'a [Vec<u8>], random: &mut Rng) -> &'a [u8] {
    corpus.get(random.usize(0..corpus.len().max(1))).map_or(&[], Vec::as_slice)
}

/// A range of `bytes`, mostly a short one.
fn range(bytes: &[u8], random: &mut Rng) -> std::ops::Range<usize> {
    let start = random.usize(0..=bytes.len());
    let most = if random.u8(0..4) == 0 { bytes.len() } else { 16 };
    start..(start + random.usize(0..=most)).min(bytes.len())
}

fn change(bytes: &mut Vec<u8>, corpus: &[Vec<u8>], random: &mut Rng) {
    let place = random.usize(0..bytes.len().max(1));
    match (random.u8(0..8), bytes.get_mut(place)) {
        (0, Some(byte)) => *byte ^= 1 << random.u8(0..8),
        (1, Some(byte)) => *byte = ODD[random.usize(0..ODD.len())],
        (2, Some(byte)) => *byte = byte.wrapping_add(random.u8(..)),
        (3, _) => drop(bytes.drain(range(bytes, random))),
        // Something of itself, once more.
        (4, _) => {
            let piece = bytes[range(bytes, random)].repeat(random.usize(1..9));
            bytes.splice(place.min(bytes.len())..place.min(bytes.len()), piece);
        }
        // Something of another in its place.
        (5, _) => {
            let other = any(corpus, random);
            let piece = other[range(other, random)].to_vec();
            let place = range(bytes, random);
            bytes.splice(place, piece);
        }
        (6, _) => bytes.truncate(place),
        _ => bytes.insert(place.min(bytes.len()), random.u8(..)),
    }
}
