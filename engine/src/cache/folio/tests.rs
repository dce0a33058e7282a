//! Single transitions of a folio's state word, without other threads.

use super::*;

const KEY: FolioKey = FolioKey::new(3, 77);

fn cached() -> FolioHeader {
    let folio = FolioHeader::new();
    folio.assign(KEY, 0, FolioOrder(0));
    folio.publish();
    folio.fill(1);
    folio
}

#[test]
fn key_keeps_mapping_and_page_apart() {
    let key = FolioKey::new(4095, (1 << FolioKey::INDEX_BITS) - 1);
    assert_eq!((key.mapping(), key.page()), (4095, (1 << 48) - 1));
    let identity = Identity::new(key, FolioOrder::MAX);
    assert_eq!((identity.key(), identity.order()), (key, FolioOrder::MAX));
}

#[test]
fn a_free_frame_cannot_be_pinned_and_the_attempt_leaves_no_trace() {
    let folio = FolioHeader::new();
    assert!(folio.try_pin(0, || folio.key() == KEY).is_err());
    assert!(folio.try_exclusive(0, Access::Change, || folio.key() == KEY).is_err());
    assert_eq!(folio.state().pins(), 0);
}

#[test]
fn a_folio_being_read_cannot_be_pinned() {
    let folio = FolioHeader::new();
    folio.assign(KEY, 0, FolioOrder(0));
    folio.publish();
    assert!(folio.try_pin(0, || folio.key() == KEY).is_err());
    folio.fill(1);
    assert!(folio.try_pin(0, || folio.key() == KEY).is_ok());
}

#[test]
fn a_folio_that_one_waits_for_is_filled_and_pinned_at_once_and_that_is_no_use_of_it() {
    let folio = FolioHeader::new();
    folio.assign(KEY, 0, FolioOrder(0));
    folio.publish();
    folio.announce_waiters();
    assert!(!folio.fill_pinned() && folio.state().filled() == 0, "releases have to kick");
    folio.retract_waiters();
    assert!(folio.fill_pinned());
    assert_eq!((folio.state().filled(), folio.state().pins()), (1, 1));
    assert!(folio.try_exclusive(0, Access::Change, || folio.key() == KEY).is_err());
    let _ = folio.unpin();
    assert_eq!(folio.look(), Usage::None);
}

#[test]
fn a_folio_being_read_is_nobodys_to_overwrite() {
    let folio = FolioHeader::new();
    folio.assign(KEY, 0, FolioOrder(0));
    folio.publish();
    assert!(folio.try_exclusive(0, Access::Overwrite, || folio.key() == KEY).is_err());
    folio.fill(1);
    assert!(folio.try_exclusive(0, Access::Overwrite, || folio.key() == KEY).is_ok());
}

#[test]
fn a_pin_on_another_identity_is_refused() {
    let folio = cached();
    assert!(folio.try_pin(0, || folio.key() == FolioKey::new(3, 78)).is_err());
    assert!(folio.try_exclusive(0, Access::Change, || folio.key() == FolioKey::new(4, 77)).is_err());
    assert_eq!(folio.state().pins(), 0);
    assert!(!folio.state().exclusive());
}

#[test]
fn exclusive_excludes_pins_and_pins_exclude_exclusive() {
    let folio = cached();
    folio.try_pin(0, || folio.key() == KEY).unwrap();
    assert!(folio.try_exclusive(0, Access::Change, || folio.key() == KEY).is_err());
    let _ = folio.unpin();
    folio.try_exclusive(0, Access::Change, || folio.key() == KEY).unwrap();
    assert!(folio.try_pin(0, || folio.key() == KEY).is_err());
    assert!(!folio.freeze_for_removal());
}

#[test]
fn wb27_only_unpinned_unreferenced_folios_freeze() {
    let folio = cached();
    folio.try_pin(0, || folio.key() == KEY).unwrap();
    assert_eq!(folio.look(), Usage::Used);
    assert_eq!(folio.look(), Usage::Held, "pinned");
    assert!(!folio.freeze_unused(), "pinned");
    let _ = folio.unpin();
    assert_eq!(folio.look(), Usage::None);
    assert!(folio.freeze_unused());
    assert!(folio.try_pin(0, || folio.key() == KEY).is_err());
    folio.thaw();
    assert!(folio.try_pin(0, || folio.key() == KEY).is_ok());
}

#[test]
fn the_last_release_kicks_when_requests_are_parked() {
    let folio = cached();
    folio.try_pin(0, || folio.key() == KEY).unwrap();
    folio.try_pin(0, || folio.key() == KEY).unwrap();
    folio.announce_waiters();
    assert_eq!(folio.unpin(), Released::Quiet);
    assert_eq!(folio.unpin(), Released::Kick);
    assert!(
        folio.try_exclusive(0, Access::Change, || folio.key() == KEY).is_err(),
        "parked requests came first"
    );
    assert!(folio.grant_exclusive(0));
    assert_eq!(folio.release_exclusive_changed(1), Released::Kick);
}

#[test]
fn pins_are_refused_before_their_count_can_overflow() {
    let folio = cached();
    for _ in 0..PINS_MAX {
        folio.try_pin(0, || folio.key() == KEY).unwrap();
    }
    assert!(folio.try_pin(0, || folio.key() == KEY).is_err());
    assert_eq!(folio.state().pins(), PINS_MAX);
}
