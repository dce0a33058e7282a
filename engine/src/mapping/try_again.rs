//! Writing without waiting for dirty memory to shrink (WB-24): what a caller uses that has better things to do than to
//! be slowed, such as a reactor that can take another task, or drop load.

use super::{GRANTS_MAX, Mapping, PAGE, Writing};
use crate::error::{Error, Result};
use crate::pin::PagePinMut;
use crate::reply::block_on;
use crate::shard::request::Pacing;

impl Mapping {
    /// As [`write_at`](Self::write_at), but where that would be slowed, or wait, because too much is dirty, it stops and
    /// says how far it came: returns how many bytes of `data` are written, fewer than all when the dirty limits don't
    /// allow more now. It still waits for other holders of a page, and for the device where a page that is overwritten in
    /// part has to be read.
    ///
    /// # Errors
    /// [`Error::Throttled`] when nothing could be written now; else those of `write_at`. After an error, and beyond the
    /// number returned, more of `data` may have been written: whoever goes on writes it again.
    pub fn try_write_at(&self, offset: u64, data: &[u8]) -> Result<usize> {
        block_on(self.try_write_at_async(offset, data))
    }

    /// As [`try_write_at`](Self::try_write_at), without blocking the thread.
    ///
    /// # Errors
    /// As `try_write_at`.
    pub async fn try_write_at_async(&self, offset: u64, data: &[u8]) -> Result<usize> {
        self.check_write(offset, data.len())?;
        let writing = Writing { pacing: Pacing::TryAgain, ..self.writing() };
        let mut done = self.write_hits(offset, data, writing)?;
        while done < data.len() {
            // Request by request, so that it is known how far it came.
            let at = offset + done as u64;
            let block = self.open.shape.order.pages();
            let end = (at / PAGE / block * block + GRANTS_MAX as u64) * PAGE - offset;
            let part = &data[done..data.len().min(end as usize)];
            match self.write_rest(at, part, 0, writing).await {
                Ok(()) => done += part.len(),
                Err(Error::Throttled { .. }) if done > 0 => break,
                Err(error) => return Err(error),
            }
        }
        Ok(done)
    }

    /// As [`pin_mut_async`](Self::pin_mut_async), but answers where that would be slowed, or wait, because too much is
    /// dirty. It still waits for other holders of the page, and for the device where the page has to be read.
    ///
    /// # Errors
    /// [`Error::Throttled`]; else those of `pin_mut`.
    pub async fn try_pin_mut_async(&self, page: u64) -> Result<PagePinMut<'_>> {
        self.check_page(page)?;
        self.open.durability.check()?;
        match self.try_pin_mut(page) {
            Some(pin) => {
                pin.link.hits.write(1);
                self.mut_before_end(page, pin)
            }
            None => self.pin_mut_slow(page, Pacing::TryAgain).await,
        }
    }
}
