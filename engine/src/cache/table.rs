//! Memory for the tables that hits touch at random: headers and index buckets.
//!
//! Such a table has some bytes a cached page, so it is far larger than what the processor's TLB covers with pages of
//! 4 KiB. It is mapped by itself, therefore, and the system is asked for hugepages (`MADV_HUGEPAGE`), and to wipe it in child
//! processes (`MADV_WIPEONFORK`; see `fork.rs`).

#[cfg(loom)]
pub(crate) use for_loom::Table;
#[cfg(not(loom))]
pub(crate) use mapped::Table;

/// Has the processor load the cache line in which `value` begins, without waiting for it. Where it can't be told to, nothing
/// happens; nor where there is no such memory.
#[inline]
pub(crate) fn prefetch<T>(value: *const T) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch is a hint: it reads no value, changes none, and never faults. SSE is part of x86_64.
        #[expect(unsafe_code, reason = "the intrinsic takes a raw pointer")]
        unsafe {
            _mm_prefetch::<_MM_HINT_T0>(value.cast());
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = value;
}

#[cfg(not(loom))]
mod mapped {
    use std::marker::PhantomData;
    use std::ops::Deref;

    use memmap2::{Advice, MmapMut};
    use rustix::mm::madvise;

    /// A fixed number of `T`s in memory of their own.
    #[derive(Debug)]
    pub(crate) struct Table<T> {
        memory: MmapMut,
        len: usize,
        is_wiped_on_fork: bool,
        values: PhantomData<T>,
    }

    // SAFETY: a `Table<T>` owns its `T`s and nothing else, like a `Box<[T]>`.
    #[expect(unsafe_code, reason = "memory of its own holds values of T")]
    unsafe impl<T: Send> Send for Table<T> {}
    // SAFETY: as for `Send`; `&Table<T>` gives `&[T]` only.
    #[expect(unsafe_code, reason = "memory of its own holds values of T")]
    unsafe impl<T: Sync> Sync for Table<T> {}

    impl<T> Table<T> {
        /// A table of `len` values made by `make`.
        ///
        /// # Errors
        /// The system's, when the memory can't be had.
        pub(crate) fn new(len: usize, make: impl Fn() -> T) -> std::io::Result<Self> {
            const { assert!(align_of::<T>() <= 4096 && size_of::<T>() > 0 && !std::mem::needs_drop::<T>()) };
            let mut memory = MmapMut::map_anon((len * size_of::<T>()).max(1))?;
            // Only advice: without hugepages the table works as well, a little slower.
            let _ = memory.advise(Advice::HugePage);
            // SAFETY: the mapping is private and anonymous, as long as `memory` says, and nobody has it yet. What a child
            // process finds in it are zeros, which are values of every T that is made here (atomics, and what is made of them).
            #[expect(unsafe_code, reason = "advice that memmap2 doesn't know")]
            let wiped = unsafe {
                madvise(memory.as_mut_ptr().cast(), memory.len(), rustix::mm::Advice::LinuxWipeOnFork)
            };
            let is_wiped_on_fork = wiped.is_ok();
            let first = memory.as_mut_ptr().cast::<T>();
            for index in 0..len {
                // SAFETY: `len` values fit into the mapping, which is page-aligned, and so aligned for T.
                #[expect(unsafe_code, reason = "fresh memory is filled value by value")]
                unsafe {
                    first.add(index).write(make());
                }
            }
            Ok(Self { memory, len, is_wiped_on_fork, values: PhantomData })
        }

        /// Whether a child process finds zeros in it: older systems, and emulations of them, can't do that.
        pub(crate) fn is_wiped_on_fork(&self) -> bool {
            self.is_wiped_on_fork
        }
    }

    impl<T> Deref for Table<T> {
        type Target = [T];

        #[inline]
        fn deref(&self) -> &[T] {
            // SAFETY: `new` has written `len` values at the start of the mapping, which nobody else has; no `&mut`
            // to them is ever made.
            #[expect(unsafe_code, reason = "the mapping holds len values of T")]
            unsafe {
                std::slice::from_raw_parts(self.memory.as_ptr().cast::<T>(), self.len)
            }
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;
        use std::sync::atomic::{AtomicU32, Ordering};

        #[test]
        fn a_table_holds_what_was_made_for_it() {
            for len in [0, 1, 5000] {
                let table = Table::new(len, || AtomicU32::new(7)).unwrap();
                assert_eq!(table.len(), len);
                table.iter().for_each(|value| assert_eq!(value.fetch_add(1, Ordering::Relaxed), 7));
                assert!(table.iter().all(|value| value.load(Ordering::Relaxed) == 8));
            }
        }
    }
}

#[cfg(loom)]
mod for_loom {
    use std::ops::Deref;

    /// Loom's atomics are no plain memory: a boxed slice holds them.
    #[derive(Debug)]
    pub(crate) struct Table<T>(Box<[T]>);

    impl<T> Table<T> {
        pub(crate) fn new(len: usize, make: impl Fn() -> T) -> std::io::Result<Self> {
            Ok(Self((0..len).map(|_| make()).collect()))
        }

        pub(crate) fn is_wiped_on_fork(&self) -> bool {
            false
        }
    }

    impl<T> Deref for Table<T> {
        type Target = [T];

        fn deref(&self) -> &[T] {
            &self.0
        }
    }
}
