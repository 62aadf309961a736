//! Compressed layers: told by their first bytes, undone as a stream.

use std::io::{self, BufRead, Read};

use flate2::bufread::MultiGzDecoder;
use ruzstd::decoding::errors::{FrameDecoderError, ReadFrameHeaderError};
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};

/// How a layer is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Not at all.
    None,
    /// RFC 1952, also several members.
    Gzip,
    /// RFC 8878, also several frames and skippable ones.
    Zstd,
}

impl Compression {
    /// Its name, as a report has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
        }
    }

    /// What these first bytes are; a tar begins with a name, which is neither.
    fn of(head: &[u8]) -> Self {
        match head {
            [0x1f, 0x8b, ..] => Self::Gzip,
            [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Self::Zstd,
            _ => Self::None,
        }
    }
}

/// The uncompressed bytes of a layer. All of `source` must belong to it.
pub enum Inflate<R: BufRead> {
    /// As it is.
    Plain(R),
    /// gzip.
    Gzip(MultiGzDecoder<R>),
    /// zstd.
    Zstd(Box<Zstd<R>>),
}

impl<R: BufRead> Inflate<R> {
    /// Looks at the first bytes and sets up what undoes them.
    ///
    /// # Errors
    ///
    /// When reading failed.
    pub fn new(mut source: R) -> io::Result<Self> {
        let head = source.fill_buf()?;
        Ok(match Compression::of(head) {
            Compression::None => Self::Plain(source),
            Compression::Gzip => Self::Gzip(MultiGzDecoder::new(source)),
            Compression::Zstd => Self::Zstd(Box::new(Zstd::new(source)?)),
        })
    }

    /// What it found.
    pub fn compression(&self) -> Compression {
        match self {
            Self::Plain(_) => Compression::None,
            Self::Gzip(_) => Compression::Gzip,
            Self::Zstd(_) => Compression::Zstd,
        }
    }
}

impl<R: BufRead> Read for Inflate<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(source) => source.read(buffer),
            Self::Gzip(source) => source.read(buffer),
            Self::Zstd(source) => source.read(buffer),
        }
    }
}

/// Frames of zstd, one after another.
pub struct Zstd<R: BufRead> {
    source: R,
    decoder: FrameDecoder,
}

/// A frame of no bytes.
const EMPTY_FRAME: [u8; 9] = [0x28, 0xb5, 0x2f, 0xfd, 0x20, 0x00, 0x01, 0x00, 0x00];

impl<R: BufRead> Zstd<R> {
    fn new(source: R) -> io::Result<Self> {
        let mut decoder = FrameDecoder::new();
        // The decoder checks a frame's window against its limit from the second frame on; this is
        // the first, so that the layer's own is checked.
        let mut empty = EMPTY_FRAME.as_slice();
        decoder.reset(&mut empty).map_err(invalid)?;
        decoder.decode_blocks(&mut empty, BlockDecodingStrategy::All).map_err(invalid)?;
        Ok(Self { source, decoder })
    }

    /// Begins the next frame; false at the end of the layer.
    fn next_frame(&mut self) -> io::Result<bool> {
        loop {
            if self.source.fill_buf()?.is_empty() {
                return Ok(false);
            }
            match self.decoder.reset(&mut self.source) {
                Ok(()) => return Ok(true),
                Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame { length, .. })) => {
                    let length = u64::from(length);
                    if io::copy(&mut self.source.by_ref().take(length), &mut io::sink())? < length {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                }
                Err(error) => return Err(invalid(error)),
            }
        }
    }

    /// Checks the sum at the end of a frame that has been read to its end.
    fn check(&self) -> io::Result<()> {
        match self.decoder.get_checksum_from_data() {
            Some(sum) if self.decoder.get_calculated_checksum() != Some(sum) => {
                Err(io::Error::new(io::ErrorKind::InvalidData, "wrong checksum in a zstd frame"))
            }
            _ => Ok(()),
        }
    }
}

impl<R: BufRead> Read for Zstd<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        loop {
            // One block at a time, so that no more than a window and a block is held.
            while self.decoder.can_collect() == 0 && !self.decoder.is_finished() {
                self.decoder.decode_blocks(&mut self.source, BlockDecodingStrategy::UptoBlocks(1)).map_err(invalid)?;
            }
            let read = self.decoder.read(buffer)?;
            if read > 0 {
                return Ok(read);
            }
            self.check()?;
            if !self.next_frame()? {
                return Ok(0);
            }
        }
    }
}

fn invalid(error: FrameDecoderError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}
