//! What must hold of a folio's state word whatever threads do, checked over the code that ships.

use super::*;
use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::thread;

const OLD: FolioKey = FolioKey::new(1, 1);
const NEW: FolioKey = FolioKey::new(1, 2);
const ORDER: FolioOrder = FolioOrder(0);

struct Frame {
    folio: FolioHeader,
    /// Stands for the frame's bytes: loom fails the model on any access that isn't ordered.
    bytes: UnsafeCell<u64>,
}

fn cached() -> Arc<Frame> {
    let frame = Arc::new(Frame { folio: FolioHeader::new(), bytes: UnsafeCell::new(OLD.0) });
    frame.folio.assign(OLD, 0, FolioOrder(0));
    frame.folio.publish();
    frame.folio.fill(1);
    frame
}

/// A reader that found the frame in a stale index entry never sees the bytes of another page, and never
/// sees them change, while the shard evicts and reuses the frame.
#[test]
fn loom_a_pinned_folio_is_never_evicted_or_reused() {
    loom::model(|| {
        let frame = cached();
        let reader = {
            let frame = frame.clone();
            thread::spawn(move || {
                if frame.folio.try_pin(0, || frame.folio.key() == OLD).is_ok() {
                    frame.bytes.with(|bytes| {
                        // SAFETY: a shared pin is held; loom checks that no one writes meanwhile.
                        #[expect(unsafe_code, reason = "loom's cell hands out raw pointers")]
                        let value = unsafe { *bytes };
                        assert_eq!(value, OLD.0);
                    });
                    let _ = frame.folio.unpin();
                }
            })
        };
        if frame.folio.look() == Usage::None && frame.folio.freeze_unused() {
            frame.folio.scrub_frozen();
            frame.bytes.with_mut(|bytes| {
                // SAFETY: the frame is frozen; loom checks that no one reads meanwhile.
                #[expect(unsafe_code, reason = "loom's cell hands out raw pointers")]
                unsafe {
                    *bytes = NEW.0;
                }
            });
            frame.folio.assign(NEW, 0, FolioOrder(0));
            frame.folio.publish();
            frame.folio.fill(1);
            assert!(frame.folio.state().pins() <= 1, "an undone attempt may still show");
        }
        reader.join().unwrap();
        assert_eq!(frame.folio.state().pins(), 0);
    });
}

/// Shared and exclusive holders never overlap.
#[test]
fn loom_shared_and_exclusive_holders_never_overlap() {
    loom::model(|| {
        let frame = cached();
        let reader = {
            let frame = frame.clone();
            thread::spawn(move || {
                if frame.folio.try_pin(0, || frame.folio.key() == OLD).is_ok() {
                    // SAFETY: a shared pin is held; loom checks it.
                    #[expect(unsafe_code, reason = "loom's cell hands out raw pointers")]
                    frame.bytes.with(|bytes| assert!(unsafe { *bytes } == OLD.0 || unsafe { *bytes } == 7));
                    let _ = frame.folio.unpin();
                }
            })
        };
        if frame.folio.try_exclusive(0, Access::Change, || frame.folio.key() == OLD).is_ok() {
            // SAFETY: exclusive possession; loom checks it.
            #[expect(unsafe_code, reason = "loom's cell hands out raw pointers")]
            frame.bytes.with_mut(|bytes| unsafe { *bytes = 7 });
            let _ = frame.folio.release_exclusive_changed(1);
        }
        reader.join().unwrap();
    });
}

/// A page that is granted as it is filled is its waiter's, and the device's bytes are there, whoever else comes at that moment.
#[test]
fn loom_a_page_that_is_granted_as_it_is_filled_has_no_exclusive_holder_in_between() {
    loom::model(|| {
        let frame = Arc::new(Frame { folio: FolioHeader::new(), bytes: UnsafeCell::new(NEW.0) });
        frame.folio.assign(OLD, 0, FolioOrder(0));
        frame.folio.publish();
        let writer = {
            let frame = frame.clone();
            thread::spawn(move || {
                if frame.folio.try_exclusive(0, Access::Change, || frame.folio.key() == OLD).is_ok() {
                    // SAFETY: exclusive possession; loom checks it.
                    #[expect(unsafe_code, reason = "loom's cell hands out raw pointers")]
                    frame.bytes.with_mut(|bytes| unsafe { *bytes = 7 });
                    let _ = frame.folio.release_exclusive_changed(1);
                } else if frame.folio.try_pin(0, || frame.folio.key() == OLD).is_ok() {
                    // SAFETY: a shared pin is held; loom checks that no one writes meanwhile, nor the device before.
                    #[expect(unsafe_code, reason = "loom's cell hands out raw pointers")]
                    frame.bytes.with(|bytes| assert_eq!(unsafe { *bytes }, OLD.0));
                    let _ = frame.folio.unpin();
                }
            })
        };
        // SAFETY: nothing is filled yet, so nobody has the page; loom checks it.
        #[expect(unsafe_code, reason = "loom's cell hands out raw pointers")]
        frame.bytes.with_mut(|bytes| unsafe { *bytes = OLD.0 });
        assert!(frame.folio.fill_pinned());
        // SAFETY: the pin that was granted is held; loom checks it.
        #[expect(unsafe_code, reason = "loom's cell hands out raw pointers")]
        frame.bytes.with(|bytes| assert_eq!(unsafe { *bytes }, OLD.0));
        let _ = frame.folio.unpin();
        writer.join().unwrap();
        assert_eq!(frame.folio.state().pins(), 0);
    });
}

/// A reader that comes to a folio by its second page while the shard splits it has either the whole folio, which then
/// isn't split, or the half that holds its page; never a hold on the other half.
#[test]
fn loom_a_pin_beside_a_split_holds_the_folio_of_its_page() {
    loom::model(|| {
        let folio = Arc::new([FolioHeader::new(), FolioHeader::new()]);
        folio[0].assign(OLD, 0, FolioOrder(1));
        folio[1].assign(NEW, 0, FolioOrder(1));
        folio[0].publish();
        folio[0].fill(2);
        let bytes = Arc::new(UnsafeCell::new(NEW.0));
        let reader = {
            let (folio, bytes) = (folio.clone(), bytes.clone());
            thread::spawn(move || {
                // As `SharedCache::place` and `try_pin` do.
                let order = folio[1].order();
                let (head, within) = if order == FolioOrder(1) { (0, 1) } else { (1, 0) };
                let holds = || folio[1].key() == NEW && folio[1].order() == order;
                if folio[head].try_pin(within, holds).is_ok() {
                    // SAFETY: a shared pin is held; loom checks it.
                    #[expect(unsafe_code, reason = "loom's cell hands out raw pointers")]
                    bytes.with(|bytes| assert!(unsafe { *bytes } == NEW.0 || unsafe { *bytes } == 7));
                    let _ = folio[head].unpin();
                }
            })
        };
        if folio[0].freeze_for_removal() {
            folio[0].set_order(FolioOrder(0));
            folio[0].become_head(1, false);
            folio[0].thaw();
            folio[1].set_order(FolioOrder(0));
            folio[1].become_head(1, false);
            folio[1].thaw();
            // A writer of the second half.
            if folio[1].try_exclusive(0, Access::Change, || true).is_ok() {
                // SAFETY: exclusive possession; loom checks it.
                #[expect(unsafe_code, reason = "loom's cell hands out raw pointers")]
                bytes.with_mut(|bytes| unsafe { *bytes = 7 });
                let _ = folio[1].release_exclusive_changed(1);
            }
        }
        reader.join().unwrap();
        assert_eq!((folio[0].state().pins(), folio[1].state().pins()), (0, 0));
    });
}

/// A biased folio, used before.
fn biased() -> Arc<Frame> {
    let frame = cached();
    frame.folio.try_pin(0, || true).unwrap();
    frame.folio.bias();
    let _ = frame.folio.unpin();
    frame
}

fn slot(number: usize) -> &'static Slot {
    published::block(number).free_slot().unwrap()
}

/// A published pin keeps the frame from being reused, and shows the bytes of its page.
#[test]
fn loom_a_folio_with_a_published_pin_is_never_evicted_or_reused() {
    loom::model(|| {
        let frame = biased();
        let reader = {
            let frame = frame.clone();
            thread::spawn(move || {
                let slot = slot(0);
                if frame
                    .folio
                    .try_publish_at_hand(slot, (Identity::new(OLD, ORDER), AtHand::new(ORDER)))
                    .is_ok()
                {
                    frame.bytes.with(|bytes| {
                        // SAFETY: a shared pin is held; loom checks that no one writes meanwhile.
                        #[expect(unsafe_code, reason = "loom's cell hands out raw pointers")]
                        let value = unsafe { *bytes };
                        assert_eq!(value, OLD.0);
                    });
                    let _ = frame.folio.unpublish(slot);
                }
            })
        };
        if frame.folio.freeze_unused() {
            frame.folio.scrub_frozen();
            frame.bytes.with_mut(|bytes| {
                // SAFETY: the frame is frozen; loom checks that no one reads meanwhile.
                #[expect(unsafe_code, reason = "loom's cell hands out raw pointers")]
                unsafe {
                    *bytes = NEW.0;
                }
            });
            frame.folio.assign(NEW, 0, FolioOrder(0));
            frame.folio.publish();
            frame.folio.fill(1);
            // In use, and biased, as the old one was.
            frame.folio.try_pin(0, || true).unwrap();
            frame.folio.bias();
            let _ = frame.folio.unpin();
        }
        reader.join().unwrap();
        assert!(!published::is_held(&frame.folio));
    });
}

/// Published pins and exclusive holders never overlap, also where a third thread biases the folio anew.
#[test]
fn loom_published_and_exclusive_holders_never_overlap() {
    loom::model(|| {
        let frame = biased();
        let reader = {
            let frame = frame.clone();
            thread::spawn(move || {
                let slot = slot(0);
                if frame.folio.try_publish(slot, 0, || frame.folio.key() == OLD).is_ok() {
                    // SAFETY: a shared pin is held; loom checks it.
                    #[expect(unsafe_code, reason = "loom's cell hands out raw pointers")]
                    frame.bytes.with(|bytes| assert!(unsafe { *bytes } == OLD.0 || unsafe { *bytes } == 7));
                    let _ = frame.folio.unpublish(slot);
                } else if frame.folio.try_pin(0, || frame.folio.key() == OLD).is_ok() {
                    frame.folio.bias();
                    let _ = frame.folio.unpin();
                }
            })
        };
        if frame.folio.try_exclusive(0, Access::Change, || frame.folio.key() == OLD).is_ok() {
            // SAFETY: exclusive possession; loom checks it.
            #[expect(unsafe_code, reason = "loom's cell hands out raw pointers")]
            frame.bytes.with_mut(|bytes| unsafe { *bytes = 7 });
            let _ = frame.folio.release_exclusive_changed(1);
        }
        reader.join().unwrap();
    });
}

/// As the model below, for a published pin.
#[test]
fn loom_a_published_pin_released_beside_an_announcement_is_seen_or_kicks() {
    loom::model(|| {
        let frame = biased();
        let held = slot(0);
        frame.folio.try_publish(held, 0, || frame.folio.key() == OLD).unwrap();
        let holder = {
            let frame = frame.clone();
            thread::spawn(move || frame.folio.unpublish(held))
        };
        frame.folio.announce_waiters();
        let granted = frame.folio.grant_exclusive(0);
        let released = holder.join().unwrap();
        assert!(granted || released == Released::Kick);
    });
}

/// A reader that holds nothing takes no bytes for good that changed while it read, or that are another page's.
#[test]
fn loom_a_reader_that_holds_nothing_knows_torn_bytes() {
    loom::model(|| {
        let folio = Arc::new((FolioHeader::new(), AtomicU64::new(1), AtomicU64::new(1)));
        folio.0.assign(OLD, 0, FolioOrder(0));
        folio.0.publish();
        folio.0.fill(1);
        folio.0.try_pin(0, || true).unwrap();
        let _ = folio.0.unpin();
        let reader = {
            let folio = folio.clone();
            thread::spawn(move || {
                let Some(before) = folio.0.begin_reading(0) else { return };
                if folio.0.key() != OLD {
                    return;
                }
                let seen = (folio.1.load(Ordering::Relaxed), folio.2.load(Ordering::Relaxed));
                if folio.0.is_unchanged(before) {
                    assert!(seen == (1, 1) || seen == (2, 2), "{seen:?}");
                }
            })
        };
        let write = |value| {
            folio.1.store(value, Ordering::Relaxed);
            folio.2.store(value, Ordering::Relaxed);
        };
        if folio.0.try_exclusive(0, Access::Change, || true).is_ok() {
            // What the store buffer of a processor keeps in order, and an exclusive holder's acquisition doesn't.
            fence(Ordering::Release);
            write(2);
            let _ = folio.0.release_exclusive_changed(1);
        }
        if folio.0.freeze_unused() {
            folio.0.scrub_frozen();
            fence(Ordering::Release);
            write(3);
            folio.0.assign(NEW, 0, FolioOrder(0));
            folio.0.publish();
            folio.0.fill(1);
        }
        reader.join().unwrap();
    });
}

/// A request parked on a pinned folio is never forgotten: either the shard sees the pin gone when it looks
/// again after announcing, or the release kicks.
#[test]
fn loom_a_release_beside_an_announcement_is_seen_or_kicks() {
    loom::model(|| {
        let frame = cached();
        frame.folio.try_pin(0, || frame.folio.key() == OLD).unwrap();
        let holder = {
            let frame = frame.clone();
            thread::spawn(move || frame.folio.unpin())
        };
        frame.folio.announce_waiters();
        let granted = frame.folio.grant_exclusive(0);
        let released = holder.join().unwrap();
        assert!(granted || released == Released::Kick);
    });
}
