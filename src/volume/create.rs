//! Volumes come and go: making one of a version, taking one away.
//!
//! Enters: what is wanted. Leaves: a volume's directory with its record, or none. Invariant: a volume is there when its record is, and the record is the last thing
//! made and the first that goes; asking again for what is there changes nothing.

use std::path::Path;
use std::sync::Arc;

use super::layers::Layers;
use super::record::Wanted;
use super::{Prefetch, StateDir, VolumeError, VolumeName, VolumeRecord};
use crate::format::commit::{Filesystem, MAX_DEVICE_SIZE};
use crate::repo::{ImageName, MetaCache, Reference, Repository};
use crate::units::{ByteLen, PAGE_SIZE};

/// What a new volume is to be.
#[derive(Clone, Debug)]
pub struct NewVolume {
    /// Its name.
    pub name: VolumeName,
    /// Where the repository is: one place, or copies of it in several. Never empty.
    pub access: Vec<String>,
    /// The image.
    pub image: ImageName,
    /// The version; `None` is the tip of the default branch.
    pub reference: Option<Reference>,
    /// Size of the device; `None` is the image's.
    pub size: Option<ByteLen>,
    /// The filesystem that must be on it; `None` is any.
    pub filesystem: Option<Filesystem>,
    /// Whether it refuses writes.
    pub read_only: bool,
    /// What is fetched before it is asked for.
    pub prefetch: Prefetch,
    /// How much its own writes may take; `None` is no limit but the disk's.
    pub quota: Option<ByteLen>,
}

impl NewVolume {
    /// A writable volume of all that is usual.
    pub fn new(name: VolumeName, access: Vec<String>, image: ImageName) -> NewVolume {
        NewVolume {
            name,
            access,
            image,
            reference: None,
            size: None,
            filesystem: None,
            read_only: false,
            prefetch: Prefetch::Learned,
            quota: None,
        }
    }

    /// Makes the volume, of what its version is now. One of this name that was made of the same wishes is left as it is, without a question to the repository.
    pub async fn create(
        &self,
        state: &StateDir,
        repository: &Repository,
        meta: &Arc<dyn MetaCache>,
    ) -> Result<VolumeRecord, VolumeError> {
        let dir = state.volume_dir(self.name.as_str());
        if let Some(record) = VolumeRecord::load(&dir)? {
            self.check_same(&record)?;
            return Ok(record);
        }
        let reference = self.reference.clone().unwrap_or_default();
        let resolved = repository.resolve(&self.image, &reference, meta).await?;
        let (commit, branch) = (resolved.commit, resolved.branch.map(|branch| branch.to_string()));
        let found = repository.commit(&self.image, commit, meta).await?;
        if let Some(asked) = self.filesystem.filter(|asked| *asked != found.filesystem) {
            let (image, has) = (format!("{}@{reference}", self.image), found.filesystem);
            return Err(VolumeError::OtherFilesystem { image, has, asked });
        }
        let size = self.size_over(found.size)?;
        let record = VolumeRecord::new(self.wanted(), repository, commit, branch, size);
        let (name, made) = (self.name.clone(), record.clone());
        let making = move || Layers::make(&dir, name.as_str(), &made).map(drop);
        tokio::task::spawn_blocking(making).await.map_err(|_| VolumeError::Stopped)??;
        Ok(record)
    }

    fn wanted(&self) -> Wanted {
        Wanted {
            access: self.access.clone(),
            image: self.image.to_string(),
            reference: self.reference.as_ref().map(ToString::to_string),
            size: self.size,
            read_only: self.read_only,
            prefetch: self.prefetch,
            quota: self.quota,
            from: None,
        }
    }

    /// The device's size: at least the image's, in whole pages.
    fn size_over(&self, image: ByteLen) -> Result<ByteLen, VolumeError> {
        let Some(size) = self.size else { return Ok(image) };
        if size < image {
            let volume = self.name.to_string();
            return Err(VolumeError::SmallerThanImage { volume, asked: size, image });
        }
        if size > MAX_DEVICE_SIZE {
            return Err(VolumeError::TooLarge { volume: self.name.to_string(), asked: size });
        }
        Ok(ByteLen(size.0.next_multiple_of(PAGE_SIZE)))
    }

    /// Refuses a name that is taken by a volume of other wishes.
    pub fn check_same(&self, record: &VolumeRecord) -> Result<(), VolumeError> {
        match record.differs_from(&self.wanted()) {
            None => Ok(()),
            Some((option, has, asked)) => {
                Err(VolumeError::NameTaken { volume: self.name.to_string(), option, has, asked })
            }
        }
    }
}

/// Takes a volume away, which nobody may have open; its writes that were not pushed are gone. `false`: there is none. Blocks on the disk.
pub fn remove(state: &StateDir, name: &VolumeName) -> Result<bool, VolumeError> {
    let dir = state.volume_dir(name.as_str());
    if !dir.join(super::RECORD_FILE).exists() {
        return Ok(false);
    }
    let lock = Layers::lock(&dir, name.as_str())?;
    let gone = state.removed_dir(name);
    let io = |action, path: &Path| {
        let path = path.to_owned();
        move |source| VolumeError::Io { action, path, source }
    };
    // One step: there is no half of a volume.
    std::fs::rename(&dir, &gone).map_err(io("take away", &dir))?;
    crate::durable::sync_dir(crate::durable::parent_of(&dir)).map_err(io("sync", &dir))?;
    drop(lock);
    // It is no volume any more, whatever comes of this: what stays is deleted at the next start.
    if let Err(error) = std::fs::remove_dir_all(&gone) {
        tracing::warn!(dir = %gone.display(), %error, "can't delete what is left of a volume");
    }
    Ok(true)
}
