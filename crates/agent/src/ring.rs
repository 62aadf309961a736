//! The stretch of a stream that was read and is not consumed yet.
//!
//! A ring grows as it fills, up to the protocol's window, and gives its memory back when asked. Large ones lie in
//! mappings of their own that a fork does not copy: starting a command stays as cheap with a hundred megabytes of
//! unread output as with none, and no command is ever born with another one's output in its memory.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The sizes a ring takes, one after the other; the last one is the protocol's window.
const SIZES: [usize; 5] = [4 << 10, 16 << 10, 64 << 10, 256 << 10, shoal_wire::WINDOW as usize];
/// From this size on a ring has a mapping of its own.
const MAPPED_FROM: usize = 64 << 10;
/// Bytes that all rings together may take before each has to do with [`SIZES`]' second; beyond, the pipes are read
/// later and the commands wait.
const BUDGET: usize = 64 << 20;

/// Bytes that all rings take now.
static HELD: AtomicUsize = AtomicUsize::new(0);

/// Memory of a ring.
#[derive(Debug)]
enum Store {
    Heap(Box<[u8]>),
    Mapped { start: NonNull<u8>, length: usize },
}

impl Store {
    fn new(length: usize) -> Option<Self> {
        let store = if length < MAPPED_FROM { Self::Heap(vec![0; length].into_boxed_slice()) } else { map(length)? };
        HELD.fetch_add(length, Ordering::Relaxed);
        Some(store)
    }
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Heap(bytes) => bytes,
            // SAFETY: the mapping is readable, `length` long, and lives as long as `self`.
            Self::Mapped { start, length } => unsafe { std::slice::from_raw_parts(start.as_ptr(), *length) },
        }
    }
    fn bytes_mut(&mut self) -> &mut [u8] {
        match self {
            Self::Heap(bytes) => bytes,
            // SAFETY: as in `bytes`; `self` is borrowed exclusively and nobody else knows the mapping.
            Self::Mapped { start, length } => unsafe { std::slice::from_raw_parts_mut(start.as_ptr(), *length) },
        }
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        HELD.fetch_sub(self.bytes().len(), Ordering::Relaxed);
        if let Self::Mapped { start, length } = self {
            // SAFETY: exactly the range that `map` made; no slice of it outlives `self`.
            unsafe { libc::munmap(start.as_ptr().cast(), *length) };
        }
    }
}

/// Maps memory that a fork does not copy.
fn map(length: usize) -> Option<Store> {
    // SAFETY: an anonymous mapping at an address of the kernel's choice touches nothing that exists.
    let start = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            length,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    if start == libc::MAP_FAILED {
        return None;
    }
    // SAFETY: the range was just mapped. The child of a fork never looks at it.
    unsafe { libc::madvise(start, length, libc::MADV_DONTFORK) };
    NonNull::new(start.cast()).map(|start| Store::Mapped { start, length })
}

/// Bytes of a stream from `start` to `end`, both counted from the stream's own start.
#[derive(Debug, Default)]
pub struct Ring {
    store: Option<Store>,
    head: usize,
    length: usize,
    start: u64,
}

impl Ring {
    /// Offset of the first byte held.
    pub fn start(&self) -> u64 {
        self.start
    }
    /// Offset behind the last byte held.
    pub fn end(&self) -> u64 {
        self.start + self.length as u64
    }
    /// Bytes held.
    pub fn len(&self) -> usize {
        self.length
    }
    /// Bytes of memory taken.
    pub fn capacity(&self) -> usize {
        self.store.as_ref().map_or(0, |store| store.bytes().len())
    }
    /// The next size, if the window and the memory allow it.
    fn larger(&self) -> Option<usize> {
        let capacity = self.capacity();
        let larger = SIZES.into_iter().find(|size| *size > capacity)?;
        (larger <= SIZES[1] || HELD.load(Ordering::Relaxed) + larger <= BUDGET).then_some(larger)
    }
    /// Whether [`Ring::make_room`] would find room.
    pub fn has_room(&self) -> bool {
        self.length < self.capacity() || self.larger().is_some()
    }
    /// Makes room for at least one more byte, if the window and the memory allow.
    pub fn make_room(&mut self) -> bool {
        if self.length < self.capacity() {
            return true;
        }
        let Some(larger) = self.larger() else { return false };
        let Some(mut store) = Store::new(larger) else { return false };
        let (first, second) = self.held();
        let (to_first, rest) = store.bytes_mut().split_at_mut(first.len());
        to_first.copy_from_slice(first);
        if let Some(to_second) = rest.get_mut(..second.len()) {
            to_second.copy_from_slice(second);
        }
        self.store = Some(store);
        self.head = 0;
        true
    }
    /// The free memory, in the order in which it is to be filled.
    pub fn free(&mut self) -> (&mut [u8], &mut [u8]) {
        let (head, length) = (self.head, self.length);
        let Some(store) = &mut self.store else { return (&mut [], &mut []) };
        let bytes = store.bytes_mut();
        let capacity = bytes.len();
        let (front, back) = bytes.split_at_mut(head.min(capacity));
        let used_in_back = length.min(back.len());
        let used_in_front = length - used_in_back;
        let (_, free_back) = back.split_at_mut(used_in_back);
        let (_, free_front) = front.split_at_mut(used_in_front.min(head));
        if free_back.is_empty() { (free_front, &mut []) } else { (free_back, free_front) }
    }
    /// Says that so many bytes of [`Ring::free`] are filled.
    pub fn filled(&mut self, count: usize) {
        self.length = (self.length + count).min(self.capacity());
    }
    /// The bytes held, in two pieces.
    fn held(&self) -> (&[u8], &[u8]) {
        let Some(store) = &self.store else { return (&[], &[]) };
        let (front, back) = store.bytes().split_at(self.head);
        let in_back = self.length.min(back.len());
        let first = back.get(..in_back).unwrap_or(&[]);
        let second = front.get(..self.length - in_back).unwrap_or(&[]);
        (first, second)
    }
    /// Appends up to `count` bytes from `offset` on; returns how many there were.
    pub fn copy_out(&self, offset: u64, count: usize, into: &mut Vec<u8>) -> usize {
        let Some(skip) = offset.checked_sub(self.start) else { return 0 };
        let skip = (skip as usize).min(self.length);
        let count = count.min(self.length - skip);
        let (first, second) = self.held();
        let in_first = first.get(skip..).unwrap_or(&[]);
        let taken = in_first.get(..count).unwrap_or(in_first);
        into.extend_from_slice(taken);
        let skip = skip.saturating_sub(first.len());
        let rest = count - taken.len();
        into.extend_from_slice(second.get(skip..skip + rest).unwrap_or(&[]));
        count
    }
    /// Lets go of everything before `offset`.
    pub fn consume(&mut self, offset: u64) {
        let count = (offset.saturating_sub(self.start) as usize).min(self.length);
        let capacity = self.capacity();
        self.start += count as u64;
        self.length -= count;
        self.head = if self.length == 0 { 0 } else { (self.head + count) % capacity };
    }
    /// Lets go of about a quarter of what is held, the oldest; 0 when nothing is held.
    pub fn drop_oldest(&mut self) -> usize {
        let count = self.length.div_ceil(4);
        self.consume(self.start + count as u64);
        count
    }
    /// Takes no more memory than what is held needs, for a stream that has ended: hundreds of them may be kept.
    pub fn compact(&mut self) {
        self.shrink();
        if self.length == self.capacity() || self.length >= MAPPED_FROM {
            return;
        }
        let Some(mut store) = Store::new(self.length) else { return };
        let (first, second) = self.held();
        let (to_first, to_second) = store.bytes_mut().split_at_mut(first.len());
        to_first.copy_from_slice(first);
        to_second.copy_from_slice(second);
        self.store = Some(store);
        self.head = 0;
    }
    /// Gives the memory back when nothing is held.
    pub fn shrink(&mut self) {
        if self.length == 0 {
            self.store = None;
            self.head = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fill(ring: &mut Ring, bytes: &[u8]) -> usize {
        let mut done = 0;
        while done < bytes.len() && ring.make_room() {
            let (free, _) = ring.free();
            let count = free.len().min(bytes.len() - done);
            free[..count].copy_from_slice(&bytes[done..done + count]);
            ring.filled(count);
            done += count;
        }
        done
    }

    #[test]
    fn bytes_come_out_in_order_across_growth_and_wrap() {
        let source: Vec<u8> = (0..5_000_000_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        let mut ring = Ring::default();
        let (mut written, mut read, mut step) = (0, 0, 1);
        while read < source.len() {
            step = step * 7 % 90_001;
            let upto = (written + step).min(source.len());
            written += fill(&mut ring, &source[written..upto]);
            let mut out = Vec::new();
            let count = ring.copy_out(read as u64, step * 2 / 3 + 1, &mut out);
            assert_eq!(out, &source[read..read + count]);
            read += count;
            ring.consume(read as u64);
            assert_eq!(ring.start(), read as u64);
            assert_eq!(ring.end(), written as u64);
        }
        ring.shrink();
        assert_eq!(ring.capacity(), 0);
    }

    #[test]
    fn a_compacted_ring_holds_the_same_bytes_and_no_more() {
        let mut ring = Ring::default();
        fill(&mut ring, &[1; 4000]);
        ring.consume(3990);
        fill(&mut ring, &[2; 100]);
        ring.compact();
        assert_eq!((ring.capacity(), ring.start(), ring.end()), (110, 3990, 4100));
        let mut out = Vec::new();
        ring.copy_out(3995, 200, &mut out);
        assert_eq!(out, [[1; 5].as_slice(), &[2; 100]].concat());
        ring.consume(4100);
        ring.compact();
        assert_eq!(ring.capacity(), 0);
    }

    #[test]
    fn a_ring_never_holds_more_than_the_window() {
        let mut ring = Ring::default();
        assert_eq!(fill(&mut ring, &vec![7; 3 << 20]) as u64, shoal_wire::WINDOW);
        let mut out = Vec::new();
        assert_eq!(ring.copy_out(5, 10, &mut out), 10);
        assert_eq!(ring.copy_out(ring.end(), 10, &mut out), 0);
        ring.consume(ring.end() + 5);
        assert_eq!(ring.len(), 0);
    }
}
