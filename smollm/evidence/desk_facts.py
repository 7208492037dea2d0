"""Well-known facts for the desk's questions, written by hand: six topics, `asked: answer`."""

from __future__ import annotations

_CAPITALS = """
Peru: Lima; France: Paris; Japan: Tokyo; Egypt: Cairo; Spain: Madrid; Italy: Rome; Russia: Moscow;
China: Beijing; India: New Delhi; Canada: Ottawa; Australia: Canberra; Germany: Berlin;
Greece: Athens; Turkey: Ankara; Sweden: Stockholm; Norway: Oslo; Denmark: Copenhagen;
Finland: Helsinki; Poland: Warsaw; Hungary: Budapest; Austria: Vienna; Portugal: Lisbon;
Ireland: Dublin; Belgium: Brussels; Cuba: Havana; Chile: Santiago; Argentina: Buenos Aires;
Colombia: Bogota; Venezuela: Caracas; Ecuador: Quito; Kenya: Nairobi; Ethiopia: Addis Ababa;
Iran: Tehran; Iraq: Baghdad; Syria: Damascus; Lebanon: Beirut; Jordan: Amman; Thailand: Bangkok;
Vietnam: Hanoi; Indonesia: Jakarta; Malaysia: Kuala Lumpur; Nepal: Kathmandu; Pakistan: Islamabad;
Afghanistan: Kabul; Bangladesh: Dhaka; Ukraine: Kyiv; Romania: Bucharest; Bulgaria: Sofia;
Serbia: Belgrade; Croatia: Zagreb; Iceland: Reykjavik; Morocco: Rabat; Algeria: Algiers;
Tunisia: Tunis; Libya: Tripoli; Ghana: Accra; Nigeria: Abuja; Senegal: Dakar; Uganda: Kampala;
Mongolia: Ulaanbaatar; Jamaica: Kingston; Mexico: Mexico City; Cambodia: Phnom Penh;
Czechia: Prague; Scotland: Edinburgh; Wales: Cardiff
"""
_SYMBOLS = """
hydrogen: H; helium: He; lithium: Li; carbon: C; nitrogen: N; oxygen: O; fluorine: F; neon: Ne;
sodium: Na; magnesium: Mg; aluminium: Al; silicon: Si; phosphorus: P; sulfur: S; chlorine: Cl;
argon: Ar; potassium: K; calcium: Ca; titanium: Ti; chromium: Cr; manganese: Mn; iron: Fe;
cobalt: Co; nickel: Ni; copper: Cu; zinc: Zn; gallium: Ga; arsenic: As; selenium: Se; bromine: Br;
krypton: Kr; silver: Ag; tin: Sn; antimony: Sb; iodine: I; xenon: Xe; barium: Ba; tungsten: W;
platinum: Pt; gold: Au; mercury: Hg; lead: Pb; bismuth: Bi; radon: Rn; radium: Ra; uranium: U;
plutonium: Pu; boron: B; beryllium: Be; cadmium: Cd; palladium: Pd; vanadium: V; scandium: Sc;
strontium: Sr; caesium: Cs; thorium: Th; zirconium: Zr; molybdenum: Mo; iridium: Ir; osmium: Os;
rubidium: Rb; germanium: Ge; niobium: Nb; rhodium: Rh; lanthanum: La; polonium: Po
"""
_CONTINENTS = """
Peru: South America; France: Europe; Japan: Asia; Egypt: Africa; Spain: Europe; Italy: Europe;
China: Asia; India: Asia; Canada: North America; Germany: Europe; Greece: Europe; Sweden: Europe;
Norway: Europe; Denmark: Europe; Finland: Europe; Poland: Europe; Hungary: Europe; Austria: Europe;
Portugal: Europe; Ireland: Europe; Belgium: Europe; Cuba: North America; Chile: South America;
Argentina: South America; Colombia: South America; Venezuela: South America;
Ecuador: South America; Kenya: Africa; Ethiopia: Africa; Iran: Asia; Iraq: Asia; Syria: Asia;
Thailand: Asia; Vietnam: Asia; Indonesia: Asia; Malaysia: Asia; Nepal: Asia; Pakistan: Asia;
Bangladesh: Asia; Ukraine: Europe; Romania: Europe; Bulgaria: Europe; Serbia: Europe;
Croatia: Europe; Iceland: Europe; Morocco: Africa; Algeria: Africa; Tunisia: Africa; Libya: Africa;
Ghana: Africa; Nigeria: Africa; Senegal: Africa; Uganda: Africa; Mongolia: Asia;
Mexico: North America; Brazil: South America; Bolivia: South America; Uruguay: South America;
Paraguay: South America; Angola: Africa; Zambia: Africa; Mali: Africa; Chad: Africa; Laos: Asia;
Jamaica: North America; Panama: North America
"""
_OPPOSITES = """
hot: cold; big: small, little; tall: short; fast: slow; young: old; happy: sad, unhappy;
light: dark, heavy; hard: soft, easy; early: late; open: closed, close, shut; full: empty;
rich: poor; strong: weak; wet: dry; clean: dirty; loud: quiet, silent, soft; high: low; near: far;
good: bad, evil; right: wrong, left; day: night; up: down; inside: outside; front: back; love: hate;
war: peace; win: lose; begin: end, finish; buy: sell; give: take, receive; push: pull;
remember: forget; laugh: cry; true: false; thick: thin; wide: narrow; deep: shallow; sharp: dull,
blunt; smooth: rough; sweet: bitter, sour; brave: cowardly, coward, timid, fearful; polite: rude,
impolite; cheap: expensive; safe: dangerous, unsafe; simple: complex, complicated, difficult;
modern: ancient, old, traditional; public: private; success: failure; victory: defeat;
entrance: exit; arrive: leave, depart; increase: decrease; always: never; top: bottom;
north: south; east: west; summer: winter; heaven: hell; friend: enemy, foe; question: answer;
past: future, present; lazy: hardworking, diligent, industrious, active; kind: cruel, mean, unkind;
tight: loose; awake: asleep; guilty: innocent
"""
_PASTS = """
go: went; eat: ate; see: saw; take: took; give: gave; come: came; run: ran; write: wrote;
speak: spoke; drive: drove; fly: flew; swim: swam; sing: sang; drink: drank; begin: began;
break: broke; choose: chose; fall: fell; know: knew; grow: grew; throw: threw; blow: blew;
draw: drew; wear: wore; tear: tore; steal: stole; freeze: froze; forget: forgot; get: got;
hide: hid; bite: bit; ride: rode; rise: rose; buy: bought; bring: brought; think: thought;
teach: taught; catch: caught; fight: fought; sleep: slept; keep: kept; feel: felt; leave: left;
meet: met; lose: lost; find: found; hold: held; tell: told; sell: sold; stand: stood;
understand: understood; build: built; send: sent; spend: spent; win: won; sit: sat; make: made;
say: said; pay: paid; hear: heard; lead: led; shake: shook; wake: woke; become: became;
forgive: forgave; feed: fed
"""
_LANGUAGES = """
France: French; Germany: German; Spain: Spanish; Italy: Italian; Portugal: Portuguese;
Brazil: Portuguese; Mexico: Spanish; Argentina: Spanish; Chile: Spanish; Peru: Spanish;
Colombia: Spanish; Cuba: Spanish; Venezuela: Spanish; Russia: Russian; Poland: Polish;
Ukraine: Ukrainian; Hungary: Hungarian; Romania: Romanian; Bulgaria: Bulgarian; Greece: Greek;
Turkey: Turkish; Sweden: Swedish; Norway: Norwegian; Denmark: Danish; Finland: Finnish;
Iceland: Icelandic; Austria: German; Japan: Japanese; China: Chinese, Mandarin; Korea: Korean;
Vietnam: Vietnamese; Thailand: Thai; Indonesia: Indonesian; Malaysia: Malay; Iran: Persian, Farsi;
Iraq: Arabic; Egypt: Arabic; Syria: Arabic; Saudi Arabia: Arabic; Morocco: Arabic;
Algeria: Arabic; Tunisia: Arabic; Jordan: Arabic; Lebanon: Arabic; Israel: Hebrew;
Pakistan: Urdu; Bangladesh: Bengali, Bangla; Nepal: Nepali; Ethiopia: Amharic; Somalia: Somali;
Australia: English; England: English; Jamaica: English; Serbia: Serbian; Croatia: Croatian;
Slovakia: Slovak; Slovenia: Slovene, Slovenian; Albania: Albanian; Latvia: Latvian;
Lithuania: Lithuanian; Estonia: Estonian; Georgia: Georgian; Armenia: Armenian;
Mongolia: Mongolian; Cambodia: Khmer; Netherlands: Dutch
"""


def _parsed(text: str) -> dict[str, tuple[str, ...]]:
    pairs = (one.split(":") for one in " ".join(text.split()).split(";"))
    return {
        asked.strip(): tuple(answer.strip() for answer in answers.split(","))
        for asked, answers in pairs
    }


FACTS: dict[str, dict[str, tuple[str, ...]]] = {
    "capital": _parsed(_CAPITALS),
    "symbol": _parsed(_SYMBOLS),
    "continent": _parsed(_CONTINENTS),
    "opposite": _parsed(_OPPOSITES),
    "past": _parsed(_PASTS),
    "language": _parsed(_LANGUAGES),
}
"""What is asked for, and the answers that count as right, by topic; 66 of each."""
