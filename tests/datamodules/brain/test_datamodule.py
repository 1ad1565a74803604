import json
import shutil
from collections import Counter
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from common.errors import DataError
from common.modalities import TEMPLATES, canonical_name
from common.runtime.configs import find_config, read_config
from datamodules.brain.datamodule import BrainDataModule, PairDataset
from datamodules.brain.tasks import BrainTaskDataModule
from datamodules.configs import SplitConfig
from datamodules.loading import Draw
from datamodules.registry import open_archive
from datamodules.volumes.cases import case_of
from datamodules.volumes.datamodule import CropConfig, LabelConfig, VolumeLoaderConfig
from datamodules.volumes.prepare import native_space
from datamodules.volumes.reading import write_nifti

SHAPE = (40, 44, 36)
CROPS = CropConfig((16, 16, 16), flip_axes=(), overhang=0.0)


def studied(root):
    archive = open_archive(root, needs={"volumes"})
    return archive.layout, [case_of(record) for record in archive.records]


def module(root, **options):
    groups = {"crops": CROPS, "split": SplitConfig((0.75, 0.25, 0.0))}
    made = {name: replace(group, **options.pop(name, {})) for name, group in groups.items()}
    return BrainDataModule(str(root), **{"batch_size": 2, "atlas": SHAPE, "seed": 1, **options}, **made)


def ready(root, **options):
    data = module(root, **options)
    data.prepare_data()
    data.setup("fit")
    return data


@pytest.fixture(scope="module")
def data(brain_root, tmp_path_factory):
    """The archive, ready; its cache is built once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDMIM_CACHE", str(tmp_path_factory.mktemp("cache")))
        return ready(brain_root)


def listed(root, content, name="datalist.json"):
    (root / name).write_text(json.dumps(content))
    return root


def entries(root):
    """Return a manifest of the first studies of a synthetic archive, with paths relative to it."""
    return [
        {"study": f.name, "source": "brats", "image": {p.name[:-7].rpartition("_")[2]: str(p.relative_to(root))
         for p in sorted(f.glob("*.nii.gz")) if "seg" not in p.name}}
        for f in sorted((root / "brats").iterdir())
    ]  # fmt: skip


def test_sources_are_recognised_and_go_under_canonical_names(data):
    assert Counter(case.attributes["source"] for case in data.cases) == {"brats2021": 4, "ucsf_pdgm": 4, "ixi": 4}
    assert data.input_spec.channels == TEMPLATES
    sets = {frozenset(case.images) for case in data.cases}
    assert frozenset({"flair", "t1", "t1c", "t2", "dwi", "adc"}) in sets
    assert frozenset({"t1"}) in sets
    assert {len(case.images) for case in data.cases} >= {1, 4, 6}


def test_pairs_are_two_sequences_of_one_study_at_one_place(data):
    dataset = PairDataset(data.splits["train"], data.store, (16, 16, 16), "train", 1, atlas=SHAPE)
    for index in range(len(dataset)):
        sample = dataset.read(Draw(index, 0, 0))
        case = data.splits["train"][index]
        opened = data.store.open(case)
        names = opened.record.modalities
        assert set(names) == set(case.images)
        m, *start = sample["place"]
        assert sample["modality"] == m
        shape = opened.image.shape[1:]
        local = [s - (a - n) // 2 for s, a, n in zip(start, SHAPE, shape, strict=True)]
        box = tuple(slice(s, s + 16) for s in local)
        expected = opened.image[names.index(TEMPLATES[m])][box]
        assert np.array_equal(sample["image"][0].numpy(), expected.astype(np.float32))
        assert bool(sample["paired"]) == (len(names) > 1)
        if sample["paired"]:
            other = TEMPLATES[sample["partner_modality"]]
            assert other != TEMPLATES[m]
            assert np.array_equal(
                sample["partner"][0].numpy(), opened.image[names.index(other)][box].astype(np.float32)
            )
        assert 0 <= sample["image"].min() <= sample["image"].max() <= 1


def test_draws_depend_on_seed_epoch_subject_and_number_alone(data):

    def read(seed, *draw, cases=data.splits["train"]):
        return PairDataset(cases, data.store, (16, 16, 16), "train", seed, atlas=SHAPE).read(Draw(*draw))

    first = read(1, 2, 0, 0)
    again = read(1, 0, 0, 0, cases=data.splits["train"][2:])
    assert first["place"] == again["place"]
    assert first["key"] == again["key"]
    assert len({int(read(seed, 2, e, d)["key"]) for seed, e, d in ((1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1))}) == 4


def test_every_sequence_of_a_study_is_drawn_equally_often(data):
    """With equal draws per study this is the mean over studies of the mean over their sequences (E-SSL, case R4)."""
    dataset = PairDataset(data.splits["train"], data.store, (16, 16, 16), "train", 1, atlas=SHAPE)
    for index, case in enumerate(dataset.cases):
        opened = data.store.open(case)
        generator = np.random.default_rng(0)
        chosen = [dataset._choose(opened, Draw(index, 0, 0), generator) for _ in range(600)]
        names = Counter(target for target, _ in chosen)
        assert set(names) == set(range(len(case.images)))
        assert max(abs(count / 600 - 1 / len(names)) for count in names.values()) < 0.08
        assert all(target != partner for target, partner in chosen)
    losses = {"a": [2.0, 4.0], "b": [1.0, 2.0, 3.0]}
    assert np.mean([np.mean(values) for values in losses.values()]) == 2.5
    assert np.mean([value for values in losses.values() for value in values]) == 2.4


def test_pre_training_on_some_of_the_sequences(brain_root, data, capsys):
    some = ready(brain_root, modalities=["adc", "dwi", "t1c"])
    assert "5 of 12 studies have none of t1c, dwi, adc and are left out" in capsys.readouterr().out
    assert len(some.cases_in_use()) == 7
    assert {name for case in some.cases for name in case.images} == {"t1c", "dwi", "adc"}
    assert some.input_spec.channels == TEMPLATES
    drawn = {int(index) for _ in range(4) for batch in some.train_dataloader() for index in batch["modality"]}
    assert drawn <= {TEMPLATES.index(name) for name in ("t1c", "dwi", "adc")}
    assert some.store.folder.name != data.store.folder.name  # its cache is another one
    with pytest.raises(DataError, match="modalities names swi; pre-training knows flair, t1, t1c"):
        module(brain_root, modalities=["t1", "T1ce", "swi"]).index()
    root = brain_root / "brats"
    with pytest.raises(DataError, match=r"has one of pd, .* asks for; present are flair, t1, t1ce, t2"):
        module(root, modalities=["pd"]).index()


def test_controls_and_reference(brain_root):
    data = ready(brain_root, lesions=True)
    batch = next(iter(data.val_dataloader()))
    assert batch["control_image"].shape == batch["image"].shape
    assert batch["lesion"].dtype.is_signed is False
    assert not np.array_equal(batch["control_image"], batch["image"])
    references = list(data.reference_samples(3))
    masks = np.concatenate([part["modality_mask"].numpy() for part in references])
    present = {name for case in data.splits["train"] for name in case.images}
    assert masks.sum(0)[[TEMPLATES.index(name) for name in present]].min() >= 3


def test_a_manifest_in_monais_form(brain_root, tmp_path, capsys):
    root = shutil.copytree(brain_root, tmp_path / "archive")
    studies = entries(root)
    studies[0]["image"] = {name.upper(): path for name, path in studies[0]["image"].items()}
    studies[1]["image"]["swi"] = next(iter(studies[1]["image"].values()))
    data = ready(listed(root, {"training": studies[:3], "validation": studies[3:]}))
    assert data._layout.name == "brain_manifest"
    assert [len(data.splits[name]) for name in ("train", "val", "test")] == [3, 1, 0]
    assert set(data.cases[0].images) == {"flair", "t1", "t1c", "t2"}
    assert f"unknown names, which are left out; first {studies[1]['study']}: swi" in capsys.readouterr().out


def test_the_published_lists(brain_root, tmp_path):
    root = shutil.copytree(brain_root, tmp_path / "archive")
    rows = [{"image": list(study["image"].values())} for study in entries(root)]
    data = module(listed(root, {"training": rows[:3], "validation": rows[3:]}, "dataset_BraTS2021.json"))
    data.index()
    assert {case.attributes["source"] for case in data.cases} == {"BraTS2021"}
    assert [case.case_id for case in data.cases][:2] == ["BraTS2021_00000", "BraTS2021_00003"]


@pytest.mark.parametrize(
    ("content", "message"),
    [("[]", "no datalist"), ("{", "cannot be read as JSON"),
     ('{"training": [{"study": "a"}]}', r'training\[0\] needs "image"'),
     ('{"training": [{"image": {"t1": "../a.nii"}}]}', "does not lie under"),
     ('{"training": [{"image": {"t1": "a.nii", "T1n": "b.nii"}}]}', "lists t1 twice"),
     ('{"training": [{"image": {"swi": "a/a.nii"}}]}', "named swi")],
)  # fmt: skip
def test_manifests_that_say_nothing(tmp_path, content, message):
    (tmp_path / "datalist.json").write_text(content)
    with pytest.raises(DataError, match=message):
        module(tmp_path).index()


def test_a_study_listed_twice_under_two_names(brain_root, tmp_path):
    root = shutil.copytree(brain_root, tmp_path / "archive")
    studies = entries(root)
    studies.append(dict(studies[0], study="another"))
    with pytest.raises(DataError, match="BraTS2021_00000 and another are the same study under two names"):
        ready(listed(root, {"training": studies[:3], "validation": studies[3:]}))


def test_renamed_releases_are_refused_and_other_overlap_is_said(brain_root, tmp_path, capsys):
    module(brain_root).index()
    assert "part of UCSF-PDGM (4 studies) is inside BraTS (4 studies)" in capsys.readouterr().out
    root = shutil.copytree(brain_root, tmp_path / "archive")
    studies = entries(root)
    studies[1]["study"] = "BraTS-GLI-00007-000"
    with pytest.raises(DataError, match=r"BraTS 2023-GLI \(1 studies\) is BraTS 2021 \(3 studies\) under new names"):
        module(listed(root, {"training": studies})).index()


def native(path, shape=(32, 32, 12), spacing=(0.9, 0.9, 5.5)):
    rng = np.random.default_rng(3)
    write_nifti(path, (rng.random(shape) * 100 + 1).astype(np.int16), np.diag([*spacing, 1.0]))


def test_native_space_is_refused_with_the_reason(tmp_path):
    for name in ("t1", "t1c"):
        native(tmp_path / f"archive/scan_{name}.nii.gz")
    reason = (
        r"its voxels of 0.9 x 0.9 x 5.5 mm are those of a native scan and only 0% .* the skull is still on; register"
    )
    with pytest.raises(DataError, match=f"(?s)not in atlas space: {reason} it to the atlas"):
        ready(tmp_path / "archive", split={"fractions": (1, 0, 0)})


def test_a_study_without_a_known_sequence_among_good_ones(brain_root, tmp_path):
    root = shutil.copytree(brain_root, tmp_path / "archive")
    studies = entries(root)
    studies[0]["image"] = {"swi": studies[0]["image"]["t1"]}
    data = ready(listed(root, {"training": studies[:3], "validation": studies[3:]}))
    (fault,) = data.ledger.faults
    assert fault.detail == (
        f"the case has no sequence of a known name; it has swi, and known are {', '.join(TEMPLATES)}"
    )
    assert len(data._usable(data.splits["train"])) == 2


def test_volumes_smaller_than_the_crop_and_larger_than_the_atlas(brain_root):
    data = ready(brain_root, crops={"size": (48, 16, 16)}, atlas=(24, 44, 36))
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (2, 1, 48, 16, 16)
    assert not batch["image"][:, :, 0].any()
    assert all(place[1] < 0 for place in batch["place"])


def test_an_unreadable_sequence_is_one_row_and_the_study_goes_on(brain_root, tmp_path):
    root = shutil.copytree(brain_root, tmp_path / "archive")
    path = sorted(root.glob("ucsf_pdgm/*/*_T2.nii.gz"))[0]
    path.write_bytes(b"no volume")
    data = ready(root)
    assert [fault.kind for fault in data.ledger.faults] == ["unreadable"]
    case = next(case for case in data.cases if path in case.images.values())
    assert "t2" not in np.array(data.store.open(case).record.modalities)[data.store.open(case).record.modality_mask]


def test_sequences_on_different_grids(brain_root, tmp_path):
    root = shutil.copytree(brain_root, tmp_path / "archive")
    path = sorted(root.glob("ucsf_pdgm/*/*_T2.nii.gz"))[0]
    image = nib.load(path)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj)[:-2], image.affine), path)
    assert [(fault.kind, fault.path) for fault in ready(root).ledger.faults] == [("grid", str(path))]


def test_cut_about_the_centre():
    from datamodules.volumes.prepare import centered_slice

    for given, expected in (
        ((10, 3, 6), (3, 7)),
        ((240, 40, 200), (40, 200)),
        ((155, 0, 140), (0, 155)),
        ((11, 2, 7), (2, 9)),
    ):
        found = centered_slice(*given)
        assert (found.start, found.stop) == expected


TREES = {
    "brats2023": ["BraTS-PED-00001-000/BraTS-PED-00001-000-{t1n,t1c,t2w,t2f,seg}.nii.gz"],
    "brats2021": ["HGG/Brats18_2013_2_1/Brats18_2013_2_1_{t1,t1ce,t2,flair,seg}.nii.gz"],
    "ucsf_pdgm": ["UCSF-PDGM-0004_nifti/UCSF-PDGM-0004_{ADC,DWI,DWI_bias,FLAIR,T1,T1c,T2,SWI}.nii.gz",
                  "UCSF-PDGM-0004_nifti/UCSF-PDGM-0004_{tumor_segmentation}.nii.gz",
                  "UCSF-PDGM-0004_FU001d_nifti/UCSF-PDGM-0004_FU001d_{T1,T2}.nii.gz"],
    "upenn_gbm": ["images_structural/UPENN-GBM-00002_11/UPENN-GBM-00002_11_{T1,T1GD,T2,FLAIR}.nii.gz",
                  "images_structural_unstripped/UPENN-GBM-00002_11/UPENN-GBM-00002_11_{T1,T2}_unstripped.nii.gz",
                  "images_segm/UPENN-GBM-00002_11_{segm}.nii.gz"],
    "ixi": ["IXI-T1/IXI002-Guys-0828-{T1}.nii.gz", "IXI-PD/IXI002-Guys-0828-{PD}.nii.gz"],
    "isles22": ["sub-strokecase0001/ses-0001/dwi/sub-strokecase0001_ses-0001_{dwi,adc}.nii.gz",
                "sub-strokecase0001/ses-0001/anat/sub-strokecase0001_ses-0001_{FLAIR}.nii.gz",
                "derivatives/sub-strokecase0001/ses-0001/sub-strokecase0001_ses-0001_{msk}.nii.gz"],
    "mrbrains13": ["TrainingData/1/{T1,T1_1mm,T1_IR,T2_FLAIR,LabelsForTraining}.nii", "TestData/1/{T1,T1_IR}.nii"],
    "vsseg": ["vs_gk_7/vs_gk_{t1_refT1,t2_refT2,seg_refT1,seg_refT2}.nii.gz"],
    "adni": ["ADNI/002_S_0295/MPR/2006-04-18/I118671/ADNI_{002_S_0295_MR_MPR_I118671}.nii"],
    "indi": ["Caltech/0051456/session_1/anat_1/{mprage}.nii.gz"],
}  # fmt: skip
FOUND = {
    "brats2023": {"BraTS-PED-00001-000": "flair t1 t1c t2 +seg"},
    "brats2021": {"Brats18_2013_2_1": "flair t1 t1c t2 +seg"},
    "ucsf_pdgm": {"UCSF-PDGM-0004": "adc dwi flair t1 t1c t2 +seg", "UCSF-PDGM-0004_FU001d": "t1 t2"},
    "upenn_gbm": {"UPENN-GBM-00002_11": "flair t1 t1c t2 +seg"},
    "ixi": {"IXI002-Guys-0828": "pd t1"},
    "isles22": {"sub-strokecase0001_ses-0001": "adc dwi flair +seg"},
    "mrbrains13": {"Training-1": "flair t1 t1ir +seg", "Test-1": "t1 t1ir"},
    "vsseg": {"vs_gk_7": "t1c +seg"},
    "adni": {"I118671": "t1"},
    "indi": {"0051456": "t1"},
}


def touch(root, pattern):
    """Write the files that ``a/{b,c}.nii`` stands for; names alone decide, so they may be empty."""
    before, _, rest = pattern.partition("{")
    inside, _, after = rest.partition("}")
    for part in inside.split(","):
        path = root / f"{before}{part}{after}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        (path.parent / f"._{path.name}").touch()


def sequences(cases):
    return {
        case.case_id: " ".join([*sorted(map(canonical_name, case.images)), *(["+seg"] if case.labels else [])])
        for case in cases
    }


@pytest.mark.parametrize("name", TREES)
def test_official_layouts(tmp_path, name):
    for pattern in TREES[name]:
        touch(tmp_path, pattern)
    layout, cases = studied(tmp_path)
    assert layout.name == name
    assert sequences(cases) == FOUND[name]
    if name == "ucsf_pdgm":
        assert {case.patient_id for case in cases} == {"UCSF-PDGM-0004"}
    if name == "brats2021":
        assert cases[0].attributes["grade"] == "HGG"


@pytest.mark.parametrize("change", [str.lower, str.upper])
@pytest.mark.parametrize("name", TREES)
def test_official_layouts_in_any_case(tmp_path, name, change):
    for pattern in TREES[name]:
        stem, suffix = pattern.partition(".nii")[::2]
        touch(tmp_path, f"{change(stem)}.nii{suffix}")
    layout, cases = studied(tmp_path)
    assert layout.name == name
    assert {case.lower(): found for case, found in sequences(cases).items()} == {
        case.lower(): found for case, found in FOUND[name].items()
    }


@pytest.mark.parametrize("more", ["pd", "ADC"])
def test_a_generic_folder_is_no_brats(tmp_path, more):
    touch(tmp_path, "P0/P0_{t1,t2,seg}.nii.gz")
    assert studied(tmp_path)[0].name == "brats2021"
    touch(tmp_path, "P0/P0_{swi}.nii.gz")
    touch(tmp_path, f"P1/P1_{{t1,{more}}}.nii.gz")
    layout, cases = studied(tmp_path)
    assert layout.name == "folder"
    assert sequences(cases) == {"P0": "swi t1 t2 +seg", "P1": " ".join(sorted(["t1", more.lower()]))}


def test_sources_of_no_official_layout(tmp_path):
    touch(tmp_path, "a/BraTS-GLI-00001-000/BraTS-GLI-00001-000-{t1n,t1c}.nii.gz")
    touch(tmp_path, "b/P0/P0_{t1,pd}.nii.gz")
    layout, cases = studied(tmp_path)
    assert layout.name == "sources"
    assert sequences(cases) == {"BraTS-GLI-00001-000": "t1 t1c", "P0": "pd t1"}
    touch(tmp_path, "c/{x_t1,x_t2}.nii.gz")
    listed(tmp_path / "c", {"training": [{"study": "x", "source": "own", "image": {"t1": "x_t1.nii.gz"}}],
                            "validation": [{"study": "y", "image": {"t2": "x_t2.nii.gz"}}]})  # fmt: skip
    _, cases = studied(tmp_path)
    assert {case.case_id: (case.attributes["source"], case.split) for case in cases} == {
        "BraTS-GLI-00001-000": ("brats2023", "train"), "P0": ("folder", "train"), "x": ("own", "train"),
        "y": ("datalist", "val"),
    }  # fmt: skip
    touch(tmp_path, "d/{more,scans}.nii.gz")
    with pytest.raises(DataError, match=r"archives .* and d, which has volumes but is of no known layout"):
        studied(tmp_path)
    listed(tmp_path, {"training": [{"study": "x", "image": {"t1": "c/x_t1.nii.gz"}}]})
    assert studied(tmp_path)[0].name == "brain_manifest"


@pytest.mark.parametrize("task", ["ped", "met"])
def test_a_task_of_one_cohort(task, tmp_path):
    settings = read_config(find_config(f"experiments/brainmvp/configs/finetune_brats_{task}_seg.yaml"))
    for cohort in ("GLI", "PED", "MET"):
        touch(tmp_path, f"BraTS-{cohort}-00001-000/BraTS-{cohort}-00001-000-{{t1n,t1c,t2w,t2f,seg}}.nii.gz")
    options = settings["data"]["init_args"]
    split = SplitConfig((1, 0, 0))
    data = BrainTaskDataModule(str(tmp_path), options["modalities"], options["cohort"], split=split)
    data.index()
    assert [case.case_id for case in data.cases] == [f"BraTS-{task.upper()}-00001-000"]
    with pytest.raises(DataError, match=r"is called BraTS-SSA-\.\.\.,"):
        BrainTaskDataModule(str(tmp_path), options["modalities"], "SSA", split=split).index()


def test_a_manifest_knows_patients_by_their_names(tmp_path):
    for first, second in (("BraTS-GLI-00007-000", "BraTS-GLI-00007-001"), ("UPENN-GBM-00002_11", "UPENN-GBM-00002_21"),
                          ("UCSF-PDGM-0004_nifti", "UCSF-PDGM-0004_FU001d_nifti")):  # fmt: skip
        rows = [{"study": name, "image": {"t1": f"{name}.nii.gz"}} for name in (first, second)]
        listed(tmp_path, {"training": rows[:1], "validation": rows[1:]})
        with pytest.raises(DataError, match=f"1 patients are in several splits, first {first[:14]}.* Split by patient"):
            module(tmp_path).index()
        listed(tmp_path, {"training": [rows[0]], "validation": [dict(rows[1], patient="another")]})
        assert len({case.patient_id for case in module(tmp_path).all_cases()}) == 2


def test_values_of_no_region_are_a_fault_of_a_manifests_label(brain_root, tmp_path):
    root = shutil.copytree(brain_root, tmp_path / "archive")
    studies = entries(root)
    for study in studies:
        study["label"] = f"brats/{study['study']}/{study['study']}_seg.nii.gz"
    listed(root, {"training": studies[:3], "validation": studies[3:]})

    def task(enhancing):
        labels = LabelConfig(needed=True, regions={"WT": [1, 2, enhancing], "ET": [enhancing]})
        loader = VolumeLoaderConfig(max_fault_fraction=1)
        data = BrainTaskDataModule(str(root), labels=labels, atlas=SHAPE, crops=CROPS, batch_size=2, loader=loader)
        data.prepare_data()
        return data

    data = task(4)
    data.setup("fit")
    assert data.ledger.faults == []
    data = task(3)
    with pytest.raises(
        DataError, match=r"4\], but brain_manifest allows \[0, 1, 2, 3\] only: data.labels.regions must name"
    ):
        data.setup("fit")


def test_what_lies_on_an_atlas_s_grid():
    turned = np.eye(4)
    turned[:2, :2] = [[np.cos(0.2), -np.sin(0.2)], [np.sin(0.2), np.cos(0.2)]]
    assert native_space(np.diag([1.0, 1.01, 1.0, 1.0])) is None
    assert native_space(np.diag([2.0, 2.0, 2.0, 1.0])) is None, "resampled to 1 mm"
    assert "1.2 x 0.94 x 0.94 mm are those of a native scan" in native_space(np.diag([1.2, 0.94, 0.94, 1.0]))
    assert "its axes are tilted by 11 degrees" in native_space(turned)


def test_regions_by_release(brats_root):
    """R5: with the enhancing label of another release a region is silently empty, so the values are checked."""
    data = BrainTaskDataModule(str(brats_root))
    by_name = {name: data.prepare_layout(open_archive(brats_root, name)) for name in ("brats2023", "brats2021")}
    labels = np.arange(5)
    for name, expected in (
        ("brats2023", {"TC": [0, 1, 0, 1, 0], "WT": [0, 1, 1, 1, 0], "ET": [0, 0, 0, 1, 0]}),
        ("brats2021", {"TC": [0, 1, 0, 0, 1], "WT": [0, 1, 1, 0, 1], "ET": [0, 0, 0, 0, 1]}),
    ):
        regions = by_name[name].regions
        assert list(regions) == ["TC", "WT", "ET"]
        assert {region: np.isin(labels, values).astype(int).tolist() for region, values in regions.items()} == expected
    assert by_name["brats2023"].label_values == {0, 1, 2, 3}
    assert by_name["brats2021"].label_values == {0, 1, 2, 4}
