//! Users and their groups, from `/etc/passwd` and `/etc/group` of a host, and what they may open.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use foliant_nvme_pci::Host;

use crate::error::Error;

/// The user who may do everything.
const ROOT: u32 = 0;

/// A user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Account {
    pub(crate) name: String,
    pub(crate) user_id: u32,
    group_ids: Vec<u32>,
}

impl Account {
    /// The user called `name`, or with this number.
    pub(crate) fn find(host: &Host, name: &str) -> Result<Self, Error> {
        let passwd = std::fs::read_to_string(host.path("etc/passwd")).unwrap_or_default();
        let number: Option<u32> = name.parse().ok();
        let entry = passwd.lines().find_map(|line| {
            let mut fields = line.split(':');
            let (entry, id) = (fields.next()?, fields.nth(1)?.parse().ok()?);
            let group: u32 = fields.next()?.parse().ok()?;
            (entry == name || number == Some(id)).then(|| (entry.to_owned(), id, group))
        });
        match (entry, number) {
            (Some((name, user_id, group)), _) => {
                let group_ids = further_groups(host, &name).chain([group]).collect();
                Ok(Self { name, user_id, group_ids })
            }
            // Root is root without a list of users too, as on a system that has only just begun.
            (None, Some(ROOT)) => Ok(Self::root()),
            (None, None) if name == "root" => Ok(Self::root()),
            (None, Some(user_id)) => Ok(Self { name: name.to_owned(), user_id, group_ids: Vec::new() }),
            (None, None) => Err(Error::NoUser { name: name.to_owned() }),
        }
    }

    fn root() -> Self {
        Self { name: "root".to_owned(), user_id: ROOT, group_ids: vec![ROOT] }
    }

    /// The user whom this process runs as.
    pub(crate) fn current(host: &Host) -> Result<Self, Error> {
        let user_id = rustix::process::geteuid().as_raw();
        let mut account = Self::find(host, &user_id.to_string())?;
        account
            .group_ids
            .extend(rustix::process::getgroups().unwrap_or_default().iter().map(|id| id.as_raw()));
        Ok(account)
    }

    pub(crate) fn is_root(&self) -> bool {
        self.user_id == ROOT
    }

    /// Whether the user may read and write a node by its mode. Access control lists aren't looked at.
    pub(crate) fn may_use(&self, node: &Path) -> std::io::Result<bool> {
        let metadata = std::fs::metadata(node)?;
        let bits = match () {
            () if self.is_root() => return Ok(true),
            () if metadata.uid() == self.user_id => metadata.mode() >> 6,
            () if self.group_ids.contains(&metadata.gid()) => metadata.mode() >> 3,
            () => metadata.mode(),
        };
        Ok(bits & 0o6 == 0o6)
    }
}

fn further_groups(host: &Host, name: &str) -> impl Iterator<Item = u32> {
    let groups = std::fs::read_to_string(host.path("etc/group")).unwrap_or_default();
    let name = name.to_owned();
    let ids: Vec<u32> = groups
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(':').skip(2);
            let (id, members) = (fields.next()?.parse().ok()?, fields.next()?);
            members.split(',').any(|member| member == name).then_some(id)
        })
        .collect();
    ids.into_iter()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use foliant_nvme_pci::fake::FakeHost;

    use super::*;

    fn host_with_users() -> FakeHost {
        let fake = FakeHost::new();
        fake.write("etc/passwd", "root:x:0:0:root:/root:/bin/sh\ndb:x:4711:4712::/srv:/bin/sh\nbroken\n");
        fake.write("etc/group", "disk:x:6:backup,db\ndb:x:4712:\nother:x:7:dbx\n");
        fake
    }

    #[test]
    fn users_are_found_by_name_and_by_number() {
        let fake = host_with_users();
        let host = fake.host();
        let db = Account::find(&host, "db").unwrap();
        assert_eq!((db.user_id, db.group_ids.as_slice()), (4711, &[6, 4712][..]));
        assert_eq!(Account::find(&host, "4711").unwrap(), db);
        assert_eq!(Account::find(&host, "9999").unwrap().user_id, 9999);
        assert!(Account::find(&host, "0").unwrap().is_root());
        fake.remove("etc/passwd");
        assert_eq!(Account::find(&host, "0").unwrap().name, "root");
        assert!(Account::find(&host, "root").unwrap().is_root());
        let message = Account::find(&host, "nobody-here").unwrap_err().to_string();
        assert!(message.contains("nobody-here") && message.contains("id -u"), "{message}");
    }

    #[test]
    fn a_node_may_be_used_by_its_owner_its_group_or_everybody_as_the_mode_says() {
        let fake = host_with_users();
        fake.write("dev/vfio/12", "");
        let node = fake.path("dev/vfio/12");
        let owner = std::fs::metadata(&node).unwrap();
        let with = |user_id, group_ids: &[u32]| Account {
            name: "x".to_owned(),
            user_id,
            group_ids: group_ids.to_vec(),
        };
        // Nobody is root here, so that the owner's bits are looked at even where tests run as root.
        let stranger = with(4711, &[]);
        let member = with(4711, &[owner.gid()]);
        for (mode, strangers, members) in
            [(0o600, false, false), (0o660, false, true), (0o666, true, true), (0o644, false, false)]
        {
            std::fs::set_permissions(&node, std::fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(stranger.may_use(&node).unwrap(), strangers, "{mode:o}");
            assert_eq!(member.may_use(&node).unwrap(), members, "{mode:o}");
            assert!(with(ROOT, &[]).may_use(&node).unwrap());
        }
        assert!(stranger.may_use(&fake.path("dev/vfio/99")).is_err());
    }
}
