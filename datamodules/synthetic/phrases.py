"""The sentences of the synthetic reports of :mod:`datamodules.synthetic.radiographs`, and their meaning."""

from collections.abc import Mapping, Sequence

# What is taken: how the examination is called, and how a report describes it.
EXAMINATIONS = {
    "PA": ("CHEST (PA)", "single upright frontal view of the chest"),
    "AP": ("CHEST (PORTABLE AP)", "portable semi-erect frontal radiograph of the chest"),
    "LATERAL": ("CHEST (LATERAL)", "lateral view of the chest"),
    "PA AND LATERAL": ("CHEST (PA AND LAT)", "chest PA and lateral views were obtained"),
    "AP AND LATERAL": ("CHEST (AP AND LAT)", "chest AP and lateral projections were acquired"),
}

# A sentence is about a column of CheXpert if one of these occurs in it.
COLUMN_WORDS: Mapping[str, Sequence[str]] = {
    "Atelectasis": ("atelecta",),
    "Cardiomegaly": ("heart", "cardiac", "cardiomegaly", "cardiomediastinal"),
    "Consolidation": ("consolidat",),
    "Edema": ("edema",),
    "Enlarged Cardiomediastinum": ("mediastinal",),
    "Fracture": ("fracture",),
    "Lung Lesion": ("nodul", "lesion"),
    "Lung Opacity": ("opacit",),
    "Pleural Effusion": ("effusion", "pleural fluid"),
    "Pneumonia": ("pneumonia",),
    "Pneumothorax": ("pneumothora", "pleural air"),
    "Support Devices": ("tube", "devices"),
}

# Filled by `radiographs`: one set of sentences does for one side and for both.
PRESENT: Mapping[str, Sequence[str]] = {
    "effusion": (
        "there {is} {a}{side} pleural effusion{s}",
        "{a}{side} pleural effusion{s} {is} present",
        "{a}layering {side} pleural effusion{s} {is} seen",
        "pleural fluid blunts {angles}",
        "blunting of {angles} is consistent with {a}{side} pleural effusion{s}",
        "pleural effusion {where} obscures the adjacent hemidiaphragm",
        "increased density {bases} with a meniscus reflects pleural fluid",
    ),
    "pneumothorax": (
        "there {is} {a}{side} apical pneumothora{x}",
        "{a}{side} pneumothora{x} {is} identified",
        "a visceral pleural line is visible {where}, in keeping with pneumothorax",
        "lucency without vascular markings {apices} indicates {a}{side} pneumothora{x}",
        "pneumothorax is demonstrated {where}, with partial collapse of the underlying lung",
        "pleural air collects {apices}",
    ),
    "nodule": (
        "{a}rounded pulmonary nodule{s} project{v} over {lungs}",
        "there {is} {a}well circumscribed nodule{s} in {lungs}",
        "{a}{side} pulmonary nodule{s} {is} noted",
        "discrete nodular density is seen {where}",
        "{a}solitary lesion{s} {is} seen in {lungs}",
    ),
    "consolidation": (
        "there is consolidation in {lungs}",
        "patchy airspace opacity is present {where}, compatible with consolidation",
        "{a}focal {side} consolidation{s} {is} noted",
        "a hazy confluent opacity in {lungs} represents consolidation",
        "ill defined consolidation involves {lungs}",
        "{side} parenchymal opacities have consolidated",
    ),
    "cardiomegaly": (
        "the heart is enlarged",
        "there is cardiomegaly",
        "the cardiac silhouette is enlarged",
        "moderate cardiomegaly is demonstrated",
        "heart size is increased beyond the upper limits of normal",
        "the transverse diameter of the heart exceeds half of the thorax",
    ),
    "devices": (
        "an endotracheal tube terminates above the carina",
        "the tip of the endotracheal tube is ___ cm above the carina",
        "a nasogastric tube courses below the diaphragm, its tip out of view",
        "endotracheal and enteric tubes are in standard position",
        "monitoring and support devices are in appropriate position",
        "an orogastric tube passes into the stomach",
    ),
}
POSSIBLE: Mapping[str, Sequence[str]] = {
    "effusion": (
        "blunting of {angles} may reflect {a}{side} pleural effusion{s}",
        "possible {side} pleural effusion{s}",
        "{a}{side} pleural effusion{s} cannot be excluded",
    ),
    "pneumothorax": (
        "possible {side} apical pneumothora{x}",
        "{a}{side} pneumothora{x} cannot be excluded",
    ),
    "nodule": (
        "questionable nodule{s} in {lungs}",
        "possible {side} pulmonary nodule{s}, versus superimposed vessels",
    ),
    "consolidation": (
        "possible early {side} consolidation{s}",
        "vague opacity {where} may represent consolidation",
    ),
    "cardiomegaly": (
        "the heart may be enlarged, accentuated by technique",
        "possible cardiomegaly",
    ),
}
SUMMARY: Mapping[str, Sequence[str]] = {
    "effusion": (
        "{side} pleural effusion{s}",
        "{side} pleural effusion{s} with adjacent volume loss",
        "pleural effusion{s} {where}",
    ),
    "pneumothorax": (
        "{side} pneumothora{x}",
        "pneumothorax {where} without tension",
        "{side} apical pneumothora{x}, a critical result",
    ),
    "nodule": (
        "{side} pulmonary nodule{s}",
        "indeterminate nodule{s} in {lungs}",
        "{side} lung nodule{s}, for which chest CT is advised",
    ),
    "consolidation": (
        "{side} consolidation{s}",
        "consolidation in {lungs}",
        "{side} airspace consolidation{s}, follow up to resolution suggested",
    ),
    "cardiomegaly": ("cardiomegaly", "moderate cardiomegaly", "enlarged heart"),
    "devices": (
        "endotracheal tube in satisfactory position",
        "tubes as described above",
        "support devices are in place",
    ),
}
REMARKS: Mapping[str, Sequence[tuple[str, float]]] = {
    "effusion": (
        ("associated compressive atelectasis is present", 1.0),
        ("some component of atelectasis is possible", -1.0),
    ),
    "consolidation": (
        ("in the appropriate clinical setting this may represent pneumonia", -1.0),
        ("findings are suspicious for pneumonia or aspiration", -1.0),
    ),
}
# What is denied, and which of the findings must be absent for it.
ABSENT: Sequence[tuple[str, Sequence[str]]] = (
    ("there is no pleural effusion", ("effusion",)),
    ("no effusion is seen", ("effusion",)),
    ("the costophrenic angles are sharp, without pleural effusion", ("effusion",)),
    ("there is no pneumothorax", ("pneumothorax",)),
    ("no evidence of pneumothorax", ("pneumothorax",)),
    ("no pleural effusion or pneumothorax", ("effusion", "pneumothorax")),
    ("neither pneumothorax nor pleural effusion is detected", ("effusion", "pneumothorax")),
    ("there is no focal consolidation, effusion, or pneumothorax", ("effusion", "pneumothorax", "consolidation")),
    ("no focal consolidation concerning for pneumonia", ("consolidation",)),
    ("the lungs are clear of consolidation", ("consolidation", "nodule")),
    ("lungs are clear without opacity", ("consolidation", "nodule")),
    ("no suspicious pulmonary nodule", ("nodule",)),
    ("no discrete lesion or nodule is identified", ("nodule",)),
    ("heart size is normal", ("cardiomegaly",)),
    ("the cardiac silhouette is not enlarged", ("cardiomegaly",)),
    ("the cardiomediastinal silhouette is within normal limits", ("cardiomegaly",)),
    ("no support devices are visible", ("devices",)),
    ("no pulmonary edema", ()),
    ("there is no evidence of interstitial edema", ()),
    ("no acute displaced rib fracture", ()),
    ("the mediastinal and hilar contours are unremarkable", ()),
    ("normal hilar and mediastinal silhouettes", ()),
)
FILLER = (
    "the imaged upper abdomen is unremarkable",
    "mild degenerative changes of the thoracic spine are noted",
    "osseous structures are intact",
    "the hila are symmetric",
    "the trachea is midline",
    "no free air below the diaphragm",
    "the bones are diffusely demineralized",
    "soft tissues are grossly normal",
    "the remainder of the examination is otherwise unrevealing",
    "the pulmonary vasculature is not engorged",
    "surgical clips are absent from the field of view",
    "inspiratory effort is adequate and penetration is satisfactory",
    "evaluation is limited by body habitus and overlying leads",
)
NORMAL_SUMMARY = (
    "no acute cardiopulmonary process",
    "no acute intrathoracic abnormality",
    "normal chest radiograph",
    "no radiographic evidence of acute disease",
    "unremarkable examination of the chest",
)
SYMPTOMS = (
    "cough and fever", "shortness of breath", "chest pain", "dyspnea on exertion", "altered mental status",
    "hypoxia", "syncope", "leukocytosis", "abdominal pain", "weakness and malaise", "recent fall",
    "productive sputum", "tachycardia",
)  # fmt: skip
QUESTIONS = (
    "evaluate for pneumonia",
    "assess for acute process",
    "rule out infiltrate",
    "please evaluate for fluid overload",
    "interval change",
    "eval for effusion or infection",
    "question of cardiopulmonary disease",
)
COMPARISONS = (
    "None.",
    "Chest radiograph from ___.",
    "Multiple prior radiographs, most recently ___.",
    "___ and CT of the chest dated ___.",
    "No prior examinations are available for comparison.",
)
TITLE = " " * 33 + "FINAL REPORT"
NOTICES = (
    "The findings were discussed with Dr. ___ by telephone on ___ at ___, ___ minutes after discovery.",
    "These results were communicated to the referring team by ___ via page at the time of dictation.",
)
